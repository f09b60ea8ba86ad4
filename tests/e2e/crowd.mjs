/* crowd.mjs - a server under hostile load: ten thousand idle connections, bodies of a gibibyte.
 * tests/server/test_limits.c has smaller forms of both. */
import assert from 'node:assert/strict';
import {once} from 'node:events';
import {connect} from 'node:net';
import {test} from 'node:test';
import {setImmediate as nextTurn} from 'node:timers/promises';
import {memoryOf, startServer} from './start-server.mjs';

const CONNECTIONS = 10000, AT_ONCE = 500;
const GIBIBYTE = 2 ** 30;

async function dial(url) {
    const {hostname, port} = new URL(url);
    const socket = connect(Number(port), hostname);
    await once(socket, 'connect');
    return socket;
}

/* What the server says until it has said enough or closes. */
async function hear(socket, enough) {
    let text = '';
    for await (const data of socket.iterator({destroyOnReturn: false})) {
        text += data;
        if (enough(text)) break;
    }
    return text;
}

async function chat(url) {
    const response = await fetch(`${url}/v1/chat/completions`, {
        method: 'POST', headers: {'content-type': 'application/json'},
        body: JSON.stringify({messages: [{role: 'user', content: 'Hello!'}], temperature: 0, max_tokens: 16}),
    });
    assert.equal(response.status, 200);
    return (await response.json()).choices[0].message.content;
}

const health = async url => (await fetch(`${url}/health`)).json();

test(`${CONNECTIONS} idle connections, and others are answered`, async t => {
    const {url, pid} = await startServer(t, []);
    const alone = await chat(url), before = memoryOf(pid);
    const sockets = [];
    t.after(() => sockets.forEach(socket => socket.destroy()));
    while (sockets.length < CONNECTIONS)
        sockets.push(...await Promise.all(Array.from({length: AT_ONCE}, () => dial(url))));
    for (let i = 0; i < 10; i++) assert.equal(await chat(url), alone);
    assert.ok((await health(url)).connections > CONNECTIONS);

    const growth = memoryOf(pid) - before;
    t.diagnostic(`${CONNECTIONS} connections took ${growth.toFixed(1)} MiB`);
    assert.ok(growth < 32, `${growth} MiB`);
    const answers = await Promise.all(sockets.map(async socket => {
        socket.write('GET /health HTTP/1.1\r\n\r\n');
        return hear(socket, text => text.includes('"status":"ok"'));
    }));
    assert.ok(answers.every(answer => answer.startsWith('HTTP/1.1 200 ')));
});

/* Sends a body of up to 1 GiB until the server answers; what it says, and how many bytes that took. */
async function sendHuge(url, framing, piece) {
    const socket = await dial(url);
    let answer = '', sent = 0;
    socket.on('data', data => { answer += data; });
    socket.on('error', error => { answer ||= error.message; });
    socket.write(`POST /v1/chat/completions HTTP/1.1\r\n${framing}\r\n\r\n`);
    for (; sent < GIBIBYTE && !answer; sent += piece.length) {
        socket.write(piece);
        do await nextTurn(); while (socket.writableNeedDrain && !answer);
    }
    socket.destroy();
    return {answer, sent};
}

test('bodies of 1 GiB are refused at once, without being stored', async t => {
    const {url, pid} = await startServer(t, []);
    await chat(url);
    const before = memoryOf(pid, 'VmHWM'), body = Buffer.alloc(65536, 'x');
    const chunk = Buffer.concat([Buffer.from('10000\r\n'), body, Buffer.from('\r\n')]);
    const cases = [[`Content-Length: ${GIBIBYTE}`, body], ['Transfer-Encoding: chunked', chunk]];
    for (const [framing, piece] of cases) {
        const start = performance.now();
        const {answer, sent} = await sendHuge(url, framing, piece);
        assert.match(answer, /^HTTP\/1.1 413 /, framing);
        assert.match(answer, /body_too_large/);
        assert.ok(sent < GIBIBYTE / 16, `${framing}: ${sent} bytes were taken`);
        assert.ok(performance.now() - start < 5000);
    }
    const growth = memoryOf(pid, 'VmHWM') - before;
    t.diagnostic(`the server's memory grew by ${growth.toFixed(1)} MiB`);
    assert.ok(growth < 32, `${growth} MiB`);
    await chat(url);
});
