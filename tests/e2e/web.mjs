/* web.mjs - the web page in a real browser: `GUANACO_URL=http://HOST:PORT/ node --test web.mjs`.
 *
 * The server at GUANACO_URL has a base model and the adapters "pirate" and "brief", whose replies
 * begin with "Arr!" and "In short:". Without GUANACO_URL the page runs against mock-server.mjs.
 * CHROMIUM names the browser. What a server would not do on its own (hostile text, errors, a full
 * disk) is put between the page and the server. */
import assert from 'node:assert/strict';
import {readFile} from 'node:fs/promises';
import {after, afterEach, before, test} from 'node:test';
import {chromium} from 'playwright-core';

const ARGUMENTS = [
    ...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'],
    ...['--disable-background-networking', '--disable-component-update', '--disable-sync'],
];
const PHONE = {viewport: {width: 390, height: 844}, isMobile: true, hasTouch: true};

let url = process.env.GUANACO_URL;
let mock;
let browser;
let context;
let problems; /* what must not happen on any page: errors, CSP violations, requests elsewhere */

before(async () => {
    if (!url) {
        const {startMock} = await import('./mock-server.mjs');
        mock = await startMock();
        url = mock.url;
    }
    const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium';
    browser = await chromium.launch({executablePath, args: ARGUMENTS});
});

after(async () => {
    await browser?.close();
    mock?.close();
});

afterEach(() => context?.close());

/* Short replies that do not change from run to run. */
function fixSettings() {
    const fixed = {temperature: 0, max_tokens: 48};
    if (!localStorage['guanaco.settings'])
        localStorage['guanaco.settings'] = JSON.stringify(fixed);
}

function watch(page) {
    problems = [];
    page.on('pageerror', error => problems.push(`exception: ${error.message}`));
    page.on('console', message => {
        if (message.type() === 'error') problems.push(`console: ${message.text()}`);
    });
    page.on('request', request => {
        const elsewhere = !/^(data|blob):/.test(request.url());
        if (elsewhere && new URL(request.url()).origin !== new URL(url).origin)
            problems.push(`request to ${request.url()}`);
    });
    page.on('dialog', dialog => {
        problems.push(`dialog: ${dialog.message()}`);
        dialog.dismiss();
    });
}

async function newPage(options = {}) {
    context = await browser.newContext({viewport: {width: 1200, height: 800}, ...options});
    const page = await context.newPage();
    page.setDefaultTimeout(30000);
    watch(page);
    await page.addInitScript(fixSettings);
    return page;
}

async function openPage(options) {
    const page = await newPage(options);
    await page.goto(url);
    await page.locator('#picker option[value="pirate"]').waitFor({state: 'attached'});
    return page;
}

const replies = page => page.locator('.reply');
const textOf = reply => reply.locator('.prose').innerText();
const input = page => page.getByLabel('Message', {exact: true});
const isIdle = page => page.getByRole('button', {name: 'Send', exact: true}).waitFor();

async function choose(page, model) {
    await page.getByLabel('Model for the next message').selectOption(model);
}

async function send(page, text) {
    await input(page).fill(text);
    await page.keyboard.press('Enter');
}

/* Sends, waits for the end, and returns the text of the reply. */
async function ask(page, text) {
    const count = await replies(page).count();
    await send(page, text);
    await replies(page).nth(count).waitFor();
    await isIdle(page);
    return textOf(replies(page).last());
}

/* Lets each event of a reply through only after a while, whatever the server's speed. An abort
 * breaks the reply off at once, as it does a real one, although all of it has arrived here. */
function slowDown(delay) {
    const realFetch = window.fetch;
    window.fetch = async (address, options) => {
        const response = await realFetch(address, options);
        if (!String(address).includes('completions')) return response;
        let rest = '';
        const byEvent = new TransformStream({
            start(controller) {
                const {signal} = options;
                signal.addEventListener('abort', () => controller.error(signal.reason));
            },
            async transform(text, controller) {
                const events = (rest + text).split('\n\n');
                rest = events.pop();
                for (const event of events) {
                    await new Promise(resolve => setTimeout(resolve, delay));
                    controller.enqueue(`${event}\n\n`);
                }
            },
        });
        const body = response.body
            .pipeThrough(new TextDecoderStream())
            .pipeThrough(byEvent)
            .pipeThrough(new TextEncoderStream());
        return new Response(body, {status: response.status, headers: response.headers});
    };
}

/* Answers the next chat requests with this text as a stream. */
async function answerWith(page, text) {
    const event = choice => `data: ${JSON.stringify({model: 'base', choices: [choice]})}\n\n`;
    const pieces = text.match(/[^]{1,5}/g).map(content => event({index: 0, delta: {content}}));
    const end = event({index: 0, delta: {}, finish_reason: 'stop'});
    const body = `${pieces.join('')}${end}data: [DONE]\n\n`;
    await page.route('**/v1/chat/completions', route =>
        route.fulfill({contentType: 'text/event-stream', body}),
    );
}

test('the page loads without an error', async () => {
    const page = await openPage();
    assert.equal(await page.title(), 'Guanaco');
    assert.equal(await page.locator('.examples button').count(), 3);
    assert.equal(await page.locator('#banner').isHidden(), true);
    assert.deepEqual(problems, []);
});

test('the server sends the content security policy', async () => {
    const response = await fetch(url);
    const policy = response.headers.get('content-security-policy');
    assert.match(policy, /default-src 'none'/);
    assert.match(policy, /script-src 'self'(;|$)/);
    assert.match(policy, /frame-ancestors 'none'/);
});

test('a message gets a reply that grows', async () => {
    const page = await newPage();
    await page.addInitScript(slowDown, 20);
    await page.goto(url);
    await page.evaluate(() => {
        window.lengths = new Set();
        new MutationObserver(() => {
            const prose = document.querySelector('.prose');
            if (prose) window.lengths.add(prose.textContent.length);
        }).observe(document.getElementById('log'), {subtree: true, childList: true});
    });
    const text = await ask(page, 'How are you today?');
    assert.ok(text.length > 0);
    assert.ok((await page.evaluate(() => window.lengths.size)) > 2, 'it came in one piece');
    assert.match(await page.locator('.stats').innerText(), /^\d+ tokens · [\d.]+ tokens\/s$/);
    assert.equal(await page.locator('.bubble').innerText(), 'How are you today?');
    assert.deepEqual(problems, []);
});

test('one conversation switches adapters', async () => {
    const page = await openPage();
    await choose(page, 'pirate');
    assert.match(await ask(page, 'What is the moon?'), /^Arr!/);
    await choose(page, 'brief');
    assert.match(await ask(page, 'What is the sun?'), /^In short:/);
    assert.equal(await replies(page).nth(0).locator('.who').innerText(), 'pirate');
    assert.equal(await replies(page).nth(1).locator('.who').innerText(), 'brief');
    assert.deepEqual(problems, []);
});

test('stop keeps what is there', async () => {
    const page = await newPage();
    await page.addInitScript(slowDown, 1500);
    await page.goto(url);
    await send(page, 'Tell me a story.');
    await page.waitForFunction(() => document.querySelector('.prose')?.textContent.length > 0);
    await page.getByRole('button', {name: 'Stop'}).click();
    await isIdle(page);
    assert.equal(await page.locator('.note').innerText(), 'Stopped.');
    const text = await textOf(replies(page).last());
    assert.ok(text.length > 0);

    await send(page, 'Tell me a story.');
    await page.getByRole('button', {name: 'Stop'}).waitFor();
    await page.keyboard.press('Escape');
    await isIdle(page);
    assert.equal(await replies(page).last().locator('.note').innerText(), 'Stopped.');
    assert.equal(await textOf(replies(page).first()), text);
    assert.equal(await page.getByRole('button', {name: 'Regenerate'}).count(), 1);
    assert.deepEqual(problems, []);
});

test('regenerating adds a version by the chosen model', async () => {
    const page = await openPage();
    await choose(page, 'pirate');
    await ask(page, 'What is rain?');
    await choose(page, 'brief');
    await page.getByRole('button', {name: 'Regenerate'}).click();
    await page.getByText('2/2').waitFor();
    await isIdle(page);
    assert.equal(await replies(page).count(), 1);
    assert.match(await textOf(replies(page).last()), /^In short:/);
    await page.getByRole('button', {name: 'Previous version'}).click();
    assert.match(await textOf(replies(page).last()), /^Arr!/);
    assert.equal(await page.locator('.who').innerText(), 'pirate');
    assert.deepEqual(problems, []);
});

test('an edited message replaces what followed', async () => {
    const page = await openPage();
    await ask(page, 'First question?');
    await ask(page, 'Second question?');
    await page.locator('.user').first().hover();
    await page.getByRole('button', {name: 'Edit message'}).first().click();
    await page.keyboard.press('Escape');
    assert.equal(await page.locator('.bubble').count(), 2);
    await page.getByRole('button', {name: 'Edit message'}).first().click();
    await page.getByRole('textbox', {name: 'Edit message'}).fill('A better question?');
    await page.keyboard.press('Enter');
    await page.getByText('A better question?', {exact: true}).first().waitFor();
    await isIdle(page);
    assert.deepEqual(await page.locator('.bubble').allInnerTexts(), ['A better question?']);
    assert.equal(await replies(page).count(), 1);
    assert.deepEqual(problems, []);
});

test('the keyboard: Shift+Enter breaks the line', async () => {
    const page = await openPage();
    await input(page).fill('one');
    await page.keyboard.press('Shift+Enter');
    await page.keyboard.type('two');
    assert.equal(await input(page).inputValue(), 'one\ntwo');
    await page.keyboard.press('Enter');
    await isIdle(page);
    assert.equal(await page.locator('.bubble').innerText(), 'one\ntwo');
});

test('history survives a reload and can be renamed, exported, deleted', async () => {
    const page = await openPage();
    await choose(page, 'pirate');
    const text = await ask(page, 'Where is Peru?');
    await page.getByRole('button', {name: 'New chat'}).click();
    await ask(page, 'Where is Chile?');
    await page.locator('.item', {hasText: 'Where is Chile?'}).waitFor();
    await page.reload();
    await page.getByText('Where is Chile?').first().waitFor();
    const item = page.locator('.item', {hasText: 'Where is Peru?'});
    await item.getByRole('link').click();
    await replies(page).first().waitFor();
    assert.equal(await textOf(replies(page).first()), text);
    assert.equal(await page.locator('.who').innerText(), 'pirate');

    await item.getByRole('button', {name: 'Rename'}).click();
    await page.getByLabel('Title').fill('Peru');
    await page.keyboard.press('Enter');
    const renamed = page.locator('.item', {hasText: /^\s*Peru\s*$/});
    await renamed.waitFor();

    const downloading = page.waitForEvent('download');
    await renamed.getByRole('button', {name: 'Export'}).click();
    const download = await downloading;
    const file = JSON.parse(await readFile(await download.path(), 'utf8'));
    assert.equal(download.suggestedFilename(), 'Peru.json');
    assert.equal(file.title, 'Peru');
    assert.deepEqual(file.messages[0], {role: 'user', content: 'Where is Peru?'});
    assert.equal(file.messages[1].model, 'pirate');
    assert.match(file.messages[1].content, /^Arr!/);

    await renamed.getByRole('button', {name: 'Delete'}).click();
    await renamed.waitFor({state: 'detached'});
    assert.equal(await replies(page).count(), 0);
    await page.getByRole('button', {name: 'Undo'}).click();
    await renamed.waitFor();
    await page.reload();
    await renamed.waitFor();
    assert.deepEqual(problems, []);
});

test('settings and the blend reach the server', async () => {
    const page = await openPage();
    await page.getByRole('button', {name: 'Settings', exact: true}).click();
    await page.getByLabel('System prompt').fill('Be kind.');
    await page.getByLabel('Top p').fill('0.9');
    await page.getByLabel('Seed').fill('7');
    await page.getByLabel('Temperature').fill('9'); /* out of range: not kept */
    await page.getByLabel('API key').fill(' secret ');
    await page.getByRole('slider', {name: 'pirate'}).fill('0.75');
    await page.getByRole('slider', {name: 'brief'}).fill('0.5');
    await page.keyboard.press('Escape');
    await choose(page, '/blend');
    const requesting = page.waitForRequest('**/v1/chat/completions');
    await ask(page, 'Who are you?');
    const request = await requesting;
    const body = request.postDataJSON();
    const {data} = await (await fetch(new URL('v1/models', url))).json();
    assert.equal(body.model, data.find(model => !model.parent).id);
    assert.deepEqual(
        body.adapters.sort((a, b) => b.scale - a.scale),
        [
            {name: 'pirate', scale: 0.75},
            {name: 'brief', scale: 0.5},
        ],
    );
    assert.deepEqual(body.messages, [
        {role: 'system', content: 'Be kind.'},
        {role: 'user', content: 'Who are you?'},
    ]);
    assert.deepEqual(
        [body.temperature, body.top_p, body.seed, body.max_tokens, 'top_k' in body],
        [0, 0.9, 7, 48, false],
    );
    assert.deepEqual([body.stream, body.stream_options], [true, {include_usage: true}]);
    assert.equal(request.headers().authorization, 'Bearer secret');
    assert.match(await page.locator('.who').innerText(), /pirate × 0.75/);
    assert.equal(await page.locator('.error').isHidden(), true);
    assert.deepEqual(problems, []);
});

test('the theme can be chosen and is kept', async () => {
    const page = await openPage({colorScheme: 'light'});
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await ground();
    await page.getByRole('button', {name: 'Settings', exact: true}).click();
    await page.getByText('Dark', {exact: true}).click();
    const dark = await ground();
    assert.notEqual(dark, light);
    await page.reload();
    assert.equal(await ground(), dark);
});

test('on a phone nothing scrolls sideways and the list is a drawer', async () => {
    const page = await openPage(PHONE);
    const code = `\`\`\`\n${'long '.repeat(60)}\n\`\`\``;
    await answerWith(page, `${code}\n\n${'x'.repeat(400)}\n\n|a|b|\n|-|-|\n`);
    await ask(page, 'y'.repeat(300));
    const width = () => page.evaluate(() => document.documentElement.scrollWidth);
    assert.equal(await width(), 390);
    const scroller = page.locator('#scroller');
    assert.equal(await scroller.evaluate(element => element.scrollWidth <= 390), true);

    const sidebar = page.getByRole('complementary', {name: 'Conversations'});
    assert.equal(await sidebar.isVisible(), false);
    await page.getByRole('button', {name: 'Open the list of conversations'}).click();
    await sidebar.waitFor();
    assert.equal(await page.locator(':focus').getAttribute('aria-label'), 'Close the list');
    await page.keyboard.press('Escape');
    await sidebar.waitFor({state: 'hidden'});
    assert.equal(await width(), 390);
    assert.deepEqual(problems, []);
});

const HOSTILE = `Hello <script>window.pwned = 1</script>

<script>window.pwned = 2</script>
<img src=x onerror="window.pwned = 3"> and <img src="http://evil.example/pixel.png">
<svg onload="window.pwned = 4"><animate onbegin="window.pwned = 5" attributeName="x"/></svg>
<iframe srcdoc="<script>parent.pwned = 6</script>"></iframe>
<form action="http://evil.example/"><button formaction="javascript:pwned = 7">go</button></form>
<style>body { display: none }</style><link rel="stylesheet" href="http://evil.example/x.css">
<math><mtext><table><mglyph><style><img src=x onerror="window.pwned = 8"></style></mglyph></table>
<p style="position: fixed; inset: 0" onclick="window.pwned = 9" id="send">cover</p>
<base href="http://evil.example/"><meta http-equiv="refresh" content="0;url=http://evil.example/">

[one](javascript:window.pwned=10) [two](JaVaScRiPt&colon;window.pwned=11) <javascript:pwned=12>
[three](data:text/html,<script>window.pwned=13</script>) [four](vbscript:x "onclick=pwned")
![pixel](http://evil.example/pixel.png) [five](https://example.org/" onmouseover="window.pwned=14)

\`\`\`html"><img/src=x/onerror=window.pwned=15>
<img src=x onerror="window.pwned = 16">
\`\`\`

<b onmouseover="window.pwned = 17">bold</b> <details open ontoggle="window.pwned = 18">x</details>
`;

test('a hostile reply runs nothing, loads nothing, and looks like text', async () => {
    const page = await openPage();
    await page.evaluate(() => {
        window.violations = [];
        addEventListener('securitypolicyviolation', event =>
            window.violations.push(event.violatedDirective),
        );
    });
    await answerWith(page, HOSTILE);
    const text = await ask(page, '<img src=x onerror="window.pwned = 19">');
    assert.match(text, /<script>window\.pwned = 2<\/script>/);
    const look = () =>
        page.evaluate(() => {
            const prose = document.querySelector('.prose');
            const forbidden = 'script,img,svg,iframe,form,style,link,math,base,meta,[style],[id]';
            const handlers = [...prose.querySelectorAll('*')].filter(element =>
                element.getAttributeNames().some(name => name.startsWith('on')),
            );
            return {
                pwned: window.pwned,
                violations: window.violations,
                forbidden: document.querySelectorAll(`.prose :is(${forbidden})`).length,
                handlers: handlers.length,
                links: [...prose.querySelectorAll('a')].map(link => [
                    link.getAttribute('href')?.split(':')[0],
                    link.rel,
                    link.target,
                ]),
            };
        });
    const seen = await look();
    assert.equal(seen.pwned, undefined);
    assert.deepEqual(seen.violations, []);
    assert.deepEqual([seen.forbidden, seen.handlers], [0, 0]);
    assert.ok(seen.links.length >= 4);
    for (const [scheme, rel, target] of seen.links) {
        assert.ok([undefined, 'http', 'https'].includes(scheme), scheme);
        assert.deepEqual([rel, target], ['noopener noreferrer', '_blank']);
    }
    for (const link of await page.locator('.prose a:not([href])').all()) await link.click();
    await page.waitForTimeout(200);
    assert.equal((await look()).pwned, undefined);
    assert.deepEqual(problems, []);

    await page.reload();
    await replies(page).first().waitFor();
    assert.equal(await page.evaluate(() => window.pwned), undefined);
    assert.deepEqual(problems, []);
});

test('text that is nested too deep to parse is shown as it is', async () => {
    const page = await openPage();
    const text = `<img src=x onerror="window.pwned = 1">\n\n${'> '.repeat(5000)}deep`;
    await answerWith(page, text);
    assert.ok((await ask(page, 'Nest.')) === text);
    assert.deepEqual(problems, []);
});

test('an error is shown with a retry that works', async () => {
    const page = await openPage();
    const error = {message: 'The queue is full: <b>try later</b>.', type: 'server_error'};
    const refuse = route => route.fulfill({status: 503, json: {error}});
    await page.route('**/v1/chat/completions', refuse);
    await ask(page, 'Hello?');
    assert.equal(await page.locator('.error span').innerText(), error.message);
    assert.equal(await page.getByRole('button', {name: 'Regenerate'}).count(), 0);
    await page.unroute('**/v1/chat/completions', refuse);
    await page.getByRole('button', {name: 'Retry'}).click();
    await page.locator('.stats:not(:empty)').waitFor();
    assert.equal(await page.locator('.error').isHidden(), true);
    assert.equal(await page.locator('.versions').isHidden(), true);
});

test('an error in the middle and a cut connection keep the text so far', async () => {
    const page = await openPage();
    const event = value => `data: ${JSON.stringify(value)}\n\n`;
    const start = event({choices: [{index: 0, delta: {content: 'Half a'}}]});
    const ends = [
        [event({error: {message: 'out of memory'}}), 'out of memory'],
        ['', 'The reply ended before it was complete.'],
        ['data: {"choices"\n\n', 'The server sent a part of the reply that is not JSON.'],
    ];
    for (const [end, message] of ends) {
        const fulfil = route =>
            route.fulfill({contentType: 'text/event-stream', body: start + end});
        await page.route('**/v1/chat/completions', fulfil);
        assert.equal(await ask(page, 'Go on.'), 'Half a');
        assert.equal(await replies(page).last().locator('.error span').innerText(), message);
        await page.unroute('**/v1/chat/completions', fulfil);
    }
});

test('a server that is away is reported, and its return noticed', async () => {
    const page = await newPage();
    const away = route => route.abort('connectionrefused');
    await page.route('**/v1/**', away);
    await page.goto(url);
    await page.getByText('The server cannot be reached. Trying again').waitFor();
    await ask(page, 'Anybody there?');
    assert.equal(await page.locator('.error span').innerText(), 'The server cannot be reached.');
    await page.unroute('**/v1/**', away);
    await page.locator('#banner').waitFor({state: 'hidden'});
    await page.getByRole('button', {name: 'Retry'}).click();
    await page.locator('.stats:not(:empty)').waitFor();
});

test('a server that wants a key leads to the settings', async () => {
    const page = await newPage();
    await page.route('**/v1/models', route =>
        route.fulfill({status: 401, json: {error: {message: 'Wrong API key.'}}}),
    );
    await page.goto(url);
    await page.getByText('This server asks for an API key.').waitFor();
    await page.getByRole('button', {name: 'Open settings'}).click();
    await page.getByLabel('API key').waitFor();
});

test('a browser that cannot keep conversations says so and goes on', async () => {
    const page = await newPage();
    await page.addInitScript(() => {
        IDBObjectStore.prototype.put = () => {
            throw new DOMException('no room', 'QuotaExceededError');
        };
    });
    await page.goto(url);
    assert.ok((await ask(page, 'Do you work?')).length > 0);
    assert.match(await page.locator('#toast').innerText(), /storage is full/);
    assert.deepEqual(problems, []);
});

test('the view follows the text only from the bottom', async () => {
    const page = await openPage();
    await answerWith(page, 'A paragraph of words.\n\n'.repeat(120));
    await ask(page, 'Much text, please.');
    const scroller = page.locator('#scroller');
    const distance = () =>
        scroller.evaluate(({scrollHeight, clientHeight, scrollTop}) =>
            Math.round(scrollHeight - clientHeight - scrollTop),
        );
    await page.waitForFunction(() => {
        const {scrollHeight, clientHeight, scrollTop} = document.getElementById('scroller');
        return scrollHeight - clientHeight - scrollTop < 2;
    });
    await scroller.hover();
    await page.mouse.wheel(0, -600);
    await page.getByRole('button', {name: 'Scroll to the newest message'}).waitFor();
    await page.evaluate(() => document.getElementById('log').append('x '.repeat(4000)));
    assert.ok((await distance()) > 500);
    await page.getByRole('button', {name: 'Scroll to the newest message'}).click();
    assert.ok((await distance()) < 2);
});

test('events are read wherever the stream is cut', async () => {
    const page = await openPage();
    const read = await page.evaluate(async () => {
        const {eventData} = await import(new URL('api.js', document.baseURI));
        const bytes = new TextEncoder().encode(
            ': hello\r\ndata: {"a":\r\ndata: "🦙é"}\r\n\r\n' +
                'event: x\rdata:two\r\rdata: 3\n\ndata: lost',
        );
        const results = new Set();
        for (const size of [1, 2, 3, 5, 7, 1000]) {
            const stream = new ReadableStream({
                start(controller) {
                    for (let at = 0; at < bytes.length; at += size)
                        controller.enqueue(bytes.slice(at, at + size));
                    controller.close();
                },
            });
            const events = [];
            for await (const data of eventData(stream)) events.push(data);
            results.add(JSON.stringify(events));
        }
        return [...results];
    });
    assert.deepEqual(read, [JSON.stringify(['{"a":\n"🦙é"}', 'two', '3'])]);
});
