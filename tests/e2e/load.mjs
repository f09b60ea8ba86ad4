/* load.mjs - many streams over many adapters, in float32, while adapters come and go: each stream
 * says exactly what it says alone, no request fails, and the server's memory does not grow. */
import assert from 'node:assert/strict';
import {test} from 'node:test';
import {adapterOptions, memoryOf, startServer} from './start-server.mjs';

const questions = ['What is the capital of France?', 'Tell me about the sea.', 'How do I bake bread?',
                   'Why is the sky blue?', 'Name three animals.', 'What should I do today?',
                   'Explain gravity to a child.', 'Write a short poem.'];
const blend = [{name: 'pirate', scale: 0.5}, {name: 'brief', scale: 0.5}];
const choices = [{}, {model: 'pirate'}, {model: 'brief'}, {adapters: blend}];

async function post(url, path, body) {
    const response = await fetch(`${url}${path}`, {
        method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify(body),
    });
    assert.equal(response.status, 200, `${path}: ${response.status === 200 || await response.text()}`);
    return response;
}

/* Reads a streamed reply to its end. */
async function reply(url, i) {
    const response = await post(url, '/v1/chat/completions', {
        ...choices[i % 4], messages: [{role: 'user', content: questions[i >> 2]}],
        temperature: 0, max_tokens: 32, stream: true,
    });
    const events = (await response.text()).split('\n\n').filter(Boolean).map(line => line.slice(6));
    assert.equal(events.at(-1), '[DONE]');
    return events.slice(0, -1).map(event => JSON.parse(event).choices[0].delta.content ?? '').join('');
}

/* Loads, replaces and unloads adapters, `rounds` times. */
async function swap(url, rounds) {
    for (let i = 0; i < rounds; i++) {
        const name = `extra-${i % 3}`, path = i % 2 ? 'pirate' : 'brief';
        await post(url, '/v1/load_lora_adapter', {lora_name: name, lora_path: path});
        await post(url, '/v1/load_lora_adapter', {lora_name: 'pirate', lora_path: 'pirate', load_inplace: true});
        await post(url, '/v1/unload_lora_adapter', {lora_name: name});
    }
}

test('32 mixed streams say what each says alone while adapters are swapped 100 times', async t => {
    const {url, pid} = await startServer(t, [
        ...adapterOptions, '--compute-dtype', 'float32', '--no-prefix-cache',
    ]);
    const streams = [...Array(32).keys()], alone = [];
    for (const i of streams) alone.push(await reply(url, i));
    for (const i of streams) {
        if (i % 4 === 1) assert.match(alone[i], /^Arr!/);
        if (i % 4 === 2) assert.match(alone[i], /^In short:/);
    }
    const [together] = await Promise.all([Promise.all(streams.map(i => reply(url, i))), swap(url, 100)]);
    assert.deepEqual(together, alone);

    const before = memoryOf(pid);
    await Promise.all([Promise.all(streams.map(i => reply(url, i))), swap(url, 100)]);
    const after = memoryOf(pid);
    t.diagnostic(`resident: ${before.toFixed(1)} MiB, after 100 more swaps ${after.toFixed(1)} MiB`);
    assert.ok(after < before + 16, `${before} MiB became ${after} MiB`);

    const {engine} = await (await fetch(`${url}/health`)).json();
    assert.equal(engine.running + engine.waiting, 0);
    assert.equal(engine.kv_blocks_used, 0);
});
