/* mock-server.mjs - a stand-in for guanaco-server with the models that web.mjs expects, so that the
 * page can be worked on without an engine. `node mock-server.mjs [PORT]` serves it by hand. */
import {readFile} from 'node:fs/promises';
import {createServer} from 'node:http';
import {fileURLToPath} from 'node:url';
import {setTimeout as sleep} from 'node:timers/promises';

const WEB = new URL('../../web/', import.meta.url);
const TYPES = {html: 'text/html', js: 'text/javascript', css: 'text/css', svg: 'image/svg+xml'};
const CSP =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; " +
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; " +
    "frame-ancestors 'none'";
const MODELS = [
    {id: 'base', object: 'model'},
    {id: 'pirate', object: 'model', parent: 'base'},
    {id: 'brief', object: 'model', parent: 'base'},
];
const OPENINGS = {base: 'Well.', pirate: 'Arr!', brief: 'In short:'};

async function sendFile(path, response) {
    const name = path === '/' ? 'index.html' : path.slice(1);
    const type = TYPES[name.split('.').pop()];
    if (!type || !/^[\w.-]+(\/[\w.-]+)?$/.test(name)) return response.writeHead(404).end();
    try {
        const body = await readFile(fileURLToPath(new URL(name, WEB)));
        response.writeHead(200, {
            'Content-Type': `${type}; charset=utf-8`,
            'Content-Security-Policy': CSP,
        });
        response.end(body);
    } catch {
        response.writeHead(404).end();
    }
}

function sendJson(response, status, value) {
    response.writeHead(status, {'Content-Type': 'application/json'});
    response.end(JSON.stringify(value));
}

async function readJson(request) {
    let text = '';
    for await (const chunk of request) text += chunk;
    return JSON.parse(text);
}

/* Cuts the stream at odd places, in the middle of a character too, as a network may. */
async function writeInPieces(response, text) {
    const bytes = Buffer.from(text);
    for (let at = 0; at < bytes.length && !response.destroyed; at += 61) {
        response.write(bytes.subarray(at, at + 61));
        await sleep(2);
    }
}

async function complete(request, response) {
    const {model, messages, adapters} = await readJson(request);
    const opening = OPENINGS[adapters?.[0].name ?? model];
    if (!opening) {
        const message = `The model '${model}' does not exist.`;
        return sendJson(response, 404, {error: {message, type: 'invalid_request_error'}});
    }
    const question = messages.at(-1).content;
    const words = `${opening} You said “${question}”, and **that** is worth a thought or two.`;
    const pieces = words.match(/\s*\S+/g);
    const common = {id: 'chatcmpl-mock', object: 'chat.completion.chunk', created: 0, model};
    const event = value => `data: ${JSON.stringify({...common, ...value})}\n\n`;
    const chunk = (delta, finish = null) =>
        event({choices: [{index: 0, delta, finish_reason: finish}]});

    response.writeHead(200, {'Content-Type': 'text/event-stream'});
    await writeInPieces(response, chunk({role: 'assistant', content: ''}));
    for (const content of pieces) await writeInPieces(response, chunk({content}));
    const usage = {prompt_tokens: 9, completion_tokens: pieces.length, total_tokens: 9};
    await writeInPieces(response, chunk({}, 'stop') + event({choices: [], usage}));
    response.end('data: [DONE]\n\n');
}

export function startMock(port = 0) {
    const server = createServer((request, response) => {
        const {pathname} = new URL(request.url, 'http://localhost');
        if (pathname === '/v1/models') sendJson(response, 200, {object: 'list', data: MODELS});
        else if (pathname === '/v1/chat/completions') complete(request, response);
        else sendFile(pathname, response);
    });
    return new Promise(resolve => {
        server.listen(port, '127.0.0.1', () => {
            const url = `http://127.0.0.1:${server.address().port}/`;
            resolve({url, close: () => server.close()});
        });
    });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
    const {url} = await startMock(Number(process.argv[2] ?? 8081));
    console.log(`mock server at ${url}`);
}
