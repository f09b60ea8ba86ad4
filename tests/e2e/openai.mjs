/* openai.mjs - the official OpenAI client against a running server, as a user would write it.
 *
 * tests/e2e/run starts the server: GUANACO_URL is its address; GUANACO_SERVER, GUANACO_MODEL and
 * GUANACO_ADAPTERS are the program, the base and the folder with its adapters, for the tests that
 * need a server with other options. The adapters' replies begin with "Arr!" and "In short:". */
import assert from 'node:assert/strict';
import {basename} from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import {test} from 'node:test';
import OpenAI from 'openai';
import {startServer} from './start-server.mjs';

const url = process.env.GUANACO_URL;
const base = basename(process.env.GUANACO_MODEL);
const client = new OpenAI({baseURL: `${url}/v1`, apiKey: 'any', maxRetries: 0});
const question = [{role: 'user', content: 'What is the capital of France?'}];
const greedy = {model: base, messages: question, temperature: 0, max_tokens: 24};

async function health() {
    return (await fetch(`${url}/health`)).json();
}

function post(path, body) {
    const headers = {'content-type': 'application/json'};
    return fetch(`${url}${path}`, {method: 'POST', headers, body: JSON.stringify(body)});
}

async function collect(stream) {
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    return chunks;
}

const textOf = chunks => chunks.map(chunk => chunk.choices[0]?.delta.content ?? '').join('');

test('models: the base and its adapters', async () => {
    const models = await collect(client.models.list());
    const parents = Object.fromEntries(models.map(model => [model.id, model.parent]));
    assert.equal(parents[base], null);
    assert.equal(parents.pirate, base);
    assert.equal(parents.brief, base);
    const pirate = await client.models.retrieve('pirate');
    assert.equal(pirate.object, 'model');
    assert.equal(pirate.parent, base);
    await assert.rejects(client.models.retrieve('nobody'), OpenAI.NotFoundError);
});

test('chat: a plain reply', async () => {
    const reply = await client.chat.completions.create(greedy);
    assert.equal(reply.object, 'chat.completion');
    assert.match(reply.id, /^chatcmpl-/);
    assert.equal(reply.model, base);
    assert.equal(reply.choices.length, 1);
    const [choice] = reply.choices;
    assert.equal(choice.message.role, 'assistant');
    assert.ok(choice.message.content.length > 0);
    assert.equal(choice.message.content, choice.message.content.trimStart());
    assert.ok(['stop', 'length'].includes(choice.finish_reason));
    const {prompt_tokens, completion_tokens, total_tokens} = reply.usage;
    assert.ok(prompt_tokens > 0 && completion_tokens > 0 && completion_tokens <= 24);
    assert.equal(total_tokens, prompt_tokens + completion_tokens);
});

test('chat: a streamed reply is the plain one in pieces', async () => {
    const plain = await client.chat.completions.create(greedy);
    const chunks = await collect(await client.chat.completions.create({...greedy, stream: true}));
    assert.equal(new Set(chunks.map(chunk => chunk.id)).size, 1);
    assert.ok(chunks.every(chunk => chunk.object === 'chat.completion.chunk'));
    assert.ok(chunks.every(chunk => chunk.choices.length === 1 && !chunk.usage));
    assert.equal(chunks[0].choices[0].delta.role, 'assistant');
    assert.equal(chunks.filter(chunk => chunk.choices[0].delta.role).length, 1);
    const reasons = chunks.map(chunk => chunk.choices[0].finish_reason).filter(Boolean);
    assert.deepEqual(reasons, [plain.choices[0].finish_reason]);
    assert.equal(textOf(chunks), plain.choices[0].message.content);
});

test('chat: the usage chunk comes last, and only when asked for', async () => {
    const request = {...greedy, stream: true, stream_options: {include_usage: true}};
    const chunks = await collect(await client.chat.completions.create(request));
    const last = chunks.at(-1);
    assert.deepEqual(last.choices, []);
    assert.equal(last.usage.total_tokens, last.usage.prompt_tokens + last.usage.completion_tokens);
    assert.ok(chunks.slice(0, -1).every(chunk => !chunk.usage));
});

test('chat: raw server-sent events end with [DONE]', async () => {
    const response = await post('/v1/chat/completions', {...greedy, stream: true});
    assert.match(response.headers.get('content-type'), /^text\/event-stream/);
    const text = await response.text();
    assert.ok(text.endsWith('data: [DONE]\n\n'));
    assert.equal(text.match(/\[DONE\]/g).length, 1);
});

test('chat: an adapter by its name', async () => {
    const pirate = await client.chat.completions.create({...greedy, model: 'pirate'});
    assert.equal(pirate.model, 'pirate');
    assert.match(pirate.choices[0].message.content, /^Arr!/);
    const brief = await client.chat.completions.create({...greedy, model: 'brief'});
    assert.match(brief.choices[0].message.content, /^In short:/);
    const none = await client.chat.completions.create(greedy);
    assert.doesNotMatch(none.choices[0].message.content, /^(Arr!|In short:)/);
});

test('chat: adapters blended through the request body', async () => {
    const ask = async adapters => {
        const reply = await client.chat.completions.create({...greedy, adapters});
        return reply.choices[0].message.content;
    };
    const alone = (await client.chat.completions.create(greedy)).choices[0].message.content;
    assert.match(await ask([{name: 'pirate', scale: 1}]), /^Arr!/);
    assert.match(await ask([{name: 'brief'}]), /^In short:/);
    assert.match(await ask([{name: 'pirate', scale: 1}, {name: 'brief', scale: 0}]), /^Arr!/);
    assert.equal(await ask([{name: 'pirate', scale: 0}]), alone);
    assert.equal(await ask([]), alone);
    const blend = [{name: 'pirate', scale: 0.5}, {name: 'brief', scale: 0.5}];
    assert.equal(await ask(blend), await ask(blend));
});

test('chat: thirty-two streams at once give what each gives alone', async () => {
    const kinds = [
        greedy,
        {...greedy, model: 'pirate'},
        {...greedy, model: 'brief'},
        {...greedy, adapters: [{name: 'pirate', scale: 0.6}, {name: 'brief', scale: 0.4}]},
    ];
    const ask = async request =>
        textOf(await collect(await client.chat.completions.create({...request, stream: true})));
    const alone = [];
    for (const kind of kinds) alone.push(await ask(kind));
    const together = await Promise.all(Array.from({length: 32}, (_, i) => ask(kinds[i % 4])));
    together.forEach((text, i) => assert.equal(text, alone[i % 4]));
});

test('chat: a seed reproduces a sampled reply', async () => {
    const ask = async seed => {
        const request = {...greedy, temperature: 1, max_tokens: 32, seed};
        return (await client.chat.completions.create(request)).choices[0].message.content;
    };
    const [first, again, other] = [await ask(7), await ask(7), await ask(8)];
    assert.equal(first, again);
    assert.notEqual(first, other);
});

test('chat: several choices', async () => {
    const request = {...greedy, temperature: 1, seed: 3, n: 3};
    const reply = await client.chat.completions.create(request);
    assert.deepEqual(reply.choices.map(choice => choice.index), [0, 1, 2]);
    assert.ok(new Set(reply.choices.map(choice => choice.message.content)).size > 1);
});

test('chat: stop strings end the reply and are not part of it', async () => {
    const whole = (await client.chat.completions.create(greedy)).choices[0].message.content;
    const stop = whole.slice(5, 9);
    for (const stream of [false, true]) {
        const reply = await client.chat.completions.create({...greedy, stop: [stop], stream});
        const text = stream ? textOf(await collect(reply)) : reply.choices[0].message.content;
        assert.equal(text, whole.slice(0, whole.indexOf(stop)));
        if (!stream) assert.equal(reply.choices[0].finish_reason, 'stop');
    }
});

test('chat: logprobs', async () => {
    const request = {...greedy, max_tokens: 5, logprobs: true, top_logprobs: 3};
    const reply = await client.chat.completions.create(request);
    const {content} = reply.choices[0].logprobs;
    assert.equal(content.length, reply.usage.completion_tokens);
    for (const entry of content) {
        assert.ok(entry.logprob <= 0);
        assert.equal(entry.top_logprobs.length, 3);
        assert.equal(entry.top_logprobs[0].token, entry.token); /* greedy takes the first */
        const [a, b, c] = entry.top_logprobs.map(top => top.logprob);
        assert.ok(a >= b && b >= c);
    }
});

test('completions: text and token ids mean the same', async () => {
    const prompt = '### Human: Hello!\n### Assistant:';
    const options = {model: base, max_tokens: 12, temperature: 0};
    const {tokens} = await (await post('/tokenize', {model: base, prompt})).json();
    const fromText = await client.completions.create({...options, prompt});
    const fromIds = await client.completions.create({...options, prompt: tokens});
    assert.equal(fromText.object, 'text_completion');
    assert.equal(fromIds.choices[0].text, fromText.choices[0].text);
    assert.equal(fromIds.usage.prompt_tokens, tokens.length);
    const both = await client.completions.create({...options, prompt: [prompt, prompt]});
    assert.deepEqual(both.choices.map(choice => choice.text),
                     [fromText.choices[0].text, fromText.choices[0].text]);
});

test('completions: scoring a prompt with echo, logprobs and no new token', async () => {
    const prompt = 'The capital of France is Paris.';
    const request = {model: base, prompt, echo: true, logprobs: 2, max_tokens: 0};
    const reply = await client.completions.create(request);
    const [{text, logprobs}] = reply.choices;
    assert.equal(text, prompt);
    assert.equal(reply.usage.completion_tokens, 0);
    assert.equal(logprobs.tokens.length, reply.usage.prompt_tokens);
    assert.equal(logprobs.token_logprobs.length, logprobs.tokens.length);
    assert.equal(logprobs.token_logprobs[0], null);
    assert.ok(logprobs.token_logprobs.slice(1).every(value => value < 0));
    assert.ok(logprobs.top_logprobs.slice(1).every(top => Object.keys(top).length >= 1));
});

test('completions: a stream', async () => {
    const request = {model: 'pirate', prompt: '### Human: Hi!\n### Assistant:', max_tokens: 8,
                     temperature: 0};
    const plain = await client.completions.create(request);
    const chunks = await collect(await client.completions.create({...request, stream: true}));
    assert.equal(chunks.map(chunk => chunk.choices[0]?.text ?? '').join(''), plain.choices[0].text);
});

test('errors carry the classes that the client knows', async () => {
    const ask = change => client.chat.completions.create({...greedy, ...change});
    await assert.rejects(ask({model: 'nobody'}), OpenAI.NotFoundError);
    const nobody = {adapters: [{name: 'nobody', scale: 1}]};
    await assert.rejects(ask(nobody), OpenAI.NotFoundError);
    const bad = [{temperature: -1}, {temperature: 'hot'}, {messages: []}, {top_p: 2}, {n: 0},
                 {messages: [{role: 'wizard', content: 'x'}]}, {max_tokens: -5},
                 {no_such_option: 1}];
    for (const change of bad) {
        await assert.rejects(ask(change), error => {
            assert.ok(error instanceof OpenAI.BadRequestError, JSON.stringify(change));
            assert.equal(error.type, 'invalid_request_error');
            assert.ok(error.message.length > 10);
            return true;
        });
    }
    const response = await fetch(`${url}/v1/chat/completions`, {method: 'POST', body: '{"model":'});
    assert.equal(response.status, 400);
    assert.ok((await response.json()).error.message);
});

test('an aborted stream is canceled', async () => {
    const request = {...greedy, max_tokens: 900, stream: true, ignore_eos: true};
    const stream = await client.chat.completions.create(request);
    let seen = 0;
    for await (const chunk of stream) {
        seen += chunk.choices.length;
        if (seen === 3) break; /* the client aborts the request */
    }
    for (let tries = 0; (await health()).engine.running > 0; tries++) {
        assert.ok(tries < 100, 'the request is still running');
        await sleep(20);
    }
    const {engine} = await health();
    assert.equal(engine.waiting, 0);
    assert.equal(engine.kv_blocks_used, 0);
});

test('adapters are loaded, replaced and unloaded while the server runs', async () => {
    const load = body => post('/v1/load_lora_adapter', body);
    const ask = model => client.chat.completions.create({...greedy, model});
    assert.equal((await load({lora_name: 'guest', lora_path: 'pirate'})).status, 200);
    assert.match((await ask('guest')).choices[0].message.content, /^Arr!/);
    assert.equal((await load({lora_name: 'guest', lora_path: 'brief'})).status, 400);
    const replace = {lora_name: 'guest', lora_path: 'brief', load_inplace: true};
    assert.equal((await load(replace)).status, 200);
    assert.match((await ask('guest')).choices[0].message.content, /^In short:/);
    assert.equal((await post('/v1/unload_lora_adapter', {lora_name: 'guest'})).status, 200);
    await assert.rejects(ask('guest'), OpenAI.NotFoundError);
    assert.equal((await post('/v1/unload_lora_adapter', {lora_name: 'guest'})).status, 404);
    for (const lora_path of ['../bootstrap-13m-nf4', '/etc', 'nowhere']) {
        const refused = await load({lora_name: 'guest', lora_path});
        assert.equal(refused.status, 404, lora_path);
    }
});

test('a key is asked for when the server has one', async t => {
    const {url} = await startServer(t, ['--api-key', 'secret']);
    const guarded = `${url}/v1`;
    const ask = apiKey => new OpenAI({baseURL: guarded, apiKey, maxRetries: 0})
        .chat.completions.create(greedy);
    await assert.rejects(ask('wrong'), OpenAI.AuthenticationError);
    assert.equal((await ask('secret')).choices.length, 1);
    const refused = await fetch(`${guarded}/load_lora_adapter`, {
        method: 'POST',
        headers: {authorization: 'Bearer secret'},
        body: '{"lora_name": "x", "lora_path": "pirate"}',
    });
    assert.equal(refused.status, 403); /* without --allow-adapter-loading */
});
