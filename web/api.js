/* api.js - the server's OpenAI-compatible API, as far as the page needs it.
 *
 * Addresses are relative to the page, so it also works behind a proxy that puts it under a path. */

/* What went wrong, in words for the reader. status is the HTTP status; 0 means no answer came. */
export class ApiError extends Error {
    constructor(message, status = 0) {
        super(message);
        this.status = status;
    }
}

async function errorOf(response) {
    const text = await response.text().catch(() => '');
    let message;
    try {
        message = JSON.parse(text).error.message;
    } catch {
        message = text.length < 200 && !text.includes('<') ? text.trim() : '';
    }
    return new ApiError(
        message || `The server answered with status ${response.status}.`,
        response.status,
    );
}

async function request(path, {apiKey: typed, body, signal}) {
    const apiKey = typed.trim();
    if (/[^\x21-\x7e]/.test(apiKey))
        throw new ApiError('The API key in the settings has characters that cannot be sent.', 401);
    const headers = {};
    if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
    if (body) headers['Content-Type'] = 'application/json';
    let response;
    try {
        response = await fetch(new URL(path, document.baseURI), {
            method: body ? 'POST' : 'GET',
            body: body && JSON.stringify(body),
            headers,
            signal,
        });
    } catch (error) {
        if (error.name === 'AbortError') throw error;
        throw new ApiError('The server cannot be reached.');
    }
    if (!response.ok) throw await errorOf(response);
    return response;
}

/* [{id, parent?}]: the base has no parent, an adapter's is the id of its base. */
export async function listModels(apiKey) {
    const response = await request('v1/models', {apiKey});
    try {
        const {data} = await response.json();
        return data.map(({id, parent}) => ({id: String(id), parent}));
    } catch {
        throw new ApiError('The list of models is not in the form the OpenAI API has.', 502);
    }
}

/* The data of each server-sent event of a stream of bytes, wherever the chunks are cut. */
export async function* eventData(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    let data = [];
    try {
        for (;;) {
            const {value = '', done} = await reader.read();
            /* A \r at the end of a chunk may be half of a \r\n: it waits for the next one. */
            const lines = (rest + value).split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
            rest = lines.pop();
            for (const line of lines) {
                if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
                if (line !== '' || data.length === 0) continue;
                yield data.join('\n');
                data = [];
            }
            if (done) return;
        }
    } finally {
        reader.cancel().catch(() => {});
    }
}

function parseChunk(text) {
    let chunk;
    try {
        chunk = JSON.parse(text);
    } catch {
        throw new ApiError('The server sent a part of the reply that is not JSON.', 502);
    }
    if (chunk.error) throw new ApiError(chunk.error.message ?? String(chunk.error), 500);
    return chunk;
}

/* Streams a chat completion; onText gets each piece of text as it comes. Resolves to {model,
 * finish, usage} and rejects with an ApiError, or with an AbortError once the signal fires. */
export async function streamChat(body, {apiKey, signal, onText}) {
    const response = await request('v1/chat/completions', {
        apiKey,
        signal,
        body: {...body, stream: true, stream_options: {include_usage: true}},
    });
    const result = {};
    try {
        for await (const text of eventData(response.body)) {
            if (text === '[DONE]') break;
            const {model, usage, choices} = parseChunk(text);
            const choice = choices?.[0];
            result.model ??= model;
            result.usage = usage ?? result.usage;
            result.finish = choice?.finish_reason ?? result.finish;
            if (choice?.delta?.content) onText(choice.delta.content);
        }
    } catch (error) {
        if (error.name === 'AbortError' || error instanceof ApiError) throw error;
        throw new ApiError('The connection broke before the reply was complete.');
    }
    if (!result.finish) throw new ApiError('The reply ended before it was complete.', 502);
    return result;
}
