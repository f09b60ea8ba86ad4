/* app.js - the page: one conversation in view, and the replies being written.
 *
 * A run is a reply on its way, at most one per conversation. It belongs to the conversation and not
 * to the view: the reader may open another one meanwhile, and several can run at once. */
import {ApiError, streamChat} from './api.js';
import {$, announce, copyFrom, download, fit, part, toast} from './dom.js';
import {cancelEdit, editMessage, elementOf, pinToBottom} from './messages.js';
import {chosen, initModels, reportProblem} from './models.js';
import {initSettings, samplingOf} from './settings.js';
import {closeDrawer, drawerIsOpen, drawHistory, editTitle, initDrawer} from './sidebar.js';
import * as store from './store.js';
import {StreamView} from './stream.js';

const SAVE_EVERY = 1000; /* ms, while a reply grows */

const runs = new Map(); /* conversation id -> {conversation, message, controller, view} */
let current = store.newConversation();
let titles = [];

const toBottom = pinToBottom();
const isRunning = id => runs.has(id);
const lastOf = list => list[list.length - 1];

/* ---- History ---------------------------------------------------------------------------- */

const drawSidebar = () => drawHistory(titles, current.id, isRunning);

async function refreshHistory() {
    try {
        titles = await store.listTitles();
    } catch (error) {
        toast(`The history cannot be read: ${error.message}`);
    }
    drawSidebar();
}

let warned = false;

async function save(conversation) {
    try {
        await store.saveConversation(conversation);
        warned = false;
        const {id, title, updated} = conversation;
        titles = [{id, title, updated}, ...titles.filter(other => other.id !== id)];
        titles.sort((a, b) => b.updated - a.updated);
    } catch (error) {
        const reason =
            error.name === 'QuotaExceededError'
                ? "the browser's storage is full. Export or delete some"
                : error.message;
        if (!warned) toast(`This conversation is not being kept: ${reason}.`);
        warned = true;
    }
    drawSidebar();
}

/* The conversation as it is in memory, or else as it was kept. */
async function find(id) {
    if (id === current.id) return current;
    return runs.get(id)?.conversation ?? store.loadConversation(id);
}

async function rename(item) {
    const conversation = await find(item.dataset.id);
    editTitle(item, title => {
        if (!title || title === conversation.title) return;
        conversation.title = title;
        drawTitle();
        save(conversation);
    });
}

async function remove(id) {
    const conversation = await find(id);
    const run = runs.get(id);
    if (run) {
        run.discarded = true;
        run.controller.abort();
    }
    await store.deleteConversation(id);
    if (current.id === id) startNew();
    await refreshHistory();
    toast(`Deleted “${conversation.title}”.`, () => save(conversation));
}

async function exportFile(id) {
    const conversation = await find(id);
    const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 60);
    download(`${name}.json`, 'application/json', store.exportConversation(conversation));
}

const HISTORY_ACTIONS = {
    rename,
    export: item => exportFile(item.dataset.id),
    delete: item => remove(item.dataset.id),
};

async function historyAction(action, item) {
    try {
        await HISTORY_ACTIONS[action](item);
    } catch (error) {
        toast(`That did not work: ${error.message}`);
    }
}

/* ---- The conversation in view ----------------------------------------------------------- */

/* A reply that was being written when the page closed has no end, and no run. */
function markInterrupted(conversation) {
    for (const {versions = []} of conversation.messages)
        for (const version of versions) version.finish ??= 'interrupted';
}

function startNew() {
    if (current.messages.length === 0) return $('input').focus();
    history.pushState(null, '', location.pathname + location.search);
    show(store.newConversation());
    $('input').focus();
}

/* Opens what the address names: #ID, or a new conversation. */
async function openFromAddress() {
    const id = location.hash.slice(1);
    if (id === current.id) return;
    let conversation;
    try {
        conversation = id && (await find(id));
    } catch (error) {
        toast(`The conversation cannot be read: ${error.message}`);
    }
    if (conversation && !isRunning(id)) markInterrupted(conversation);
    if (id === location.hash.slice(1)) show(conversation || store.newConversation());
}

function show(conversation) {
    current = conversation;
    draw();
    toBottom();
}

function drawTitle() {
    const {title, messages} = current;
    $('title').textContent = messages.length ? title : 'Guanaco';
    document.title = messages.length ? `${title} · Guanaco` : 'Guanaco';
}

/* Brings the log in step with the messages, one element for each, in their order. Elements that
 * are in place are not touched: a selection, a focus, a scrolled code block stays. */
function draw() {
    const log = $('log');
    const run = runs.get(current.id);
    current.messages.forEach((message, index) => {
        const element = elementOf(message, {
            running: run?.message === message,
            isLast: index === current.messages.length - 1,
            busy: Boolean(run),
        });
        if (log.children[index] !== element) log.insertBefore(element, log.children[index] ?? null);
    });
    while (log.children.length > current.messages.length) log.lastElementChild.remove();
    $('welcome').hidden = current.messages.length > 0;
    $('stop').hidden = !run;
    $('send').hidden = Boolean(run);
    drawTitle();
    drawSidebar();
}

/* ---- Replies ---------------------------------------------------------------------------- */

/* What the model gets to see: all before the reply, without replies that failed at once. */
function requestOf(conversation, message) {
    const before = conversation.messages.slice(0, conversation.messages.indexOf(message));
    const messages = before
        .map(earlier => ({role: earlier.role, content: store.contentOf(earlier)}))
        .filter(({content}) => content !== '');
    const {system} = store.settings;
    if (system.trim()) messages.unshift({role: 'system', content: system});
    return {messages, ...samplingOf()};
}

/* Tokens a second from the first to the last piece of text, so that waiting does not count. */
function speedOf(usage, first, last) {
    const tokens = usage?.completion_tokens;
    return tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : undefined;
}

async function receive(run, version) {
    const {conversation, message, controller} = run;
    let first;
    let last;
    let saved = performance.now();
    const onText = text => {
        last = performance.now();
        first ??= last;
        version.content += text;
        run.view.push(text);
        if (first === last) draw();
        if (last - saved < SAVE_EVERY || run.discarded) return;
        saved = last;
        save(conversation);
    };
    try {
        const {apiKey} = store.settings;
        const choice = {model: version.model, adapters: version.adapters};
        const body = {...choice, ...requestOf(conversation, message)};
        const result = await streamChat(body, {apiKey, signal: controller.signal, onText});
        version.model = result.model ?? version.model;
        version.finish = result.finish;
        version.usage = result.usage;
        version.speed = speedOf(result.usage, first, last);
    } catch (error) {
        version.finish = error.name === 'AbortError' ? 'stopped' : 'error';
        if (version.finish === 'stopped') return;
        version.error = error.message;
        if (!(error instanceof ApiError)) console.error(error);
        else if (error.status === 0 || error.status === 401) reportProblem(error);
    }
}

/* Has the chosen model write a version of message, the last of the conversation. */
async function answer(conversation, message) {
    const version = {content: '', ...chosen()};
    /* A version that failed before its first word is replaced. */
    message.versions = message.versions.filter(({content}) => content !== '').concat(version);
    message.shown = message.versions.length - 1;
    conversation.updated = Date.now();
    const run = {conversation, message, controller: new AbortController()};
    runs.set(conversation.id, run);
    draw();
    run.view = new StreamView(part($('log').lastElementChild, 'text'));
    toBottom();
    announce('Waiting for the reply');
    save(conversation);

    await receive(run, version);
    runs.delete(conversation.id);
    run.view.close();
    if (!run.discarded) save(conversation);
    draw();
    if (current === conversation) announce(version.error ?? version.content);
}

function send(text) {
    const content = text.trim();
    if (content === '' || isRunning(current.id)) return false;
    if (current.messages.length === 0) {
        current.title = content.replace(/\s+/g, ' ').slice(0, 60);
        history.replaceState(null, '', `#${current.id}`);
    }
    const reply = {role: 'assistant', versions: [], shown: 0};
    current.messages.push({role: 'user', content}, reply);
    answer(current, reply);
    return true;
}

const stop = () => runs.get(current.id)?.controller.abort();

/* ---- Buttons of messages ---------------------------------------------------------------- */

function edit(index) {
    const message = current.messages[index];
    const form = editMessage(message, index >= current.messages.length - 2);
    const area = form.querySelector('textarea');
    form.addEventListener('submit', event => {
        event.preventDefault();
        if (area.value.trim() === '' || isRunning(current.id)) return;
        current.messages.length = index;
        send(area.value);
        $('input').focus();
    });
    area.addEventListener('input', () => fit(area));
    area.addEventListener('keydown', event => {
        if (event.key === 'Escape') stopEdit(message);
        else if (!isSendKey(event)) return;
        else form.requestSubmit();
        event.preventDefault();
        event.stopPropagation();
    });
}

function stopEdit(message) {
    cancelEdit(message);
    draw();
    $('input').focus();
}

function showVersion(index, step) {
    const message = current.messages[index];
    message.shown += step;
    draw();
    save(current);
}

const regenerate = index => answer(current, current.messages[index]);

const MESSAGE_ACTIONS = {
    edit,
    regenerate,
    retry: regenerate,
    copy: (index, button) => copyFrom(button, store.contentOf(current.messages[index])),
    'copy-code': (_, button) =>
        copyFrom(button, button.closest('figure').querySelector('code').textContent),
    'cancel-edit': index => stopEdit(current.messages[index]),
    previous: index => showVersion(index, -1),
    next: index => showVersion(index, 1),
};

/* ---- Start ------------------------------------------------------------------------------ */

/* Enter that ends the composition of a character is not meant for us (229 is Safari's way). */
const isSendKey = event =>
    event.key === 'Enter' && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function initComposer() {
    const input = $('input');
    const changed = () => {
        $('send').disabled = input.value.trim() === '';
        fit(input);
    };
    $('composer').addEventListener('submit', event => {
        event.preventDefault();
        if (!send(input.value)) return;
        input.value = '';
        changed();
    });
    input.addEventListener('input', changed);
    input.addEventListener('keydown', event => {
        if (!isSendKey(event)) return;
        event.preventDefault();
        $('composer').requestSubmit();
    });
    $('stop').addEventListener('click', stop);
    $('welcome').addEventListener('click', ({target}) => {
        if (target.dataset.prompt) send(target.dataset.prompt);
    });
    changed();
}

function initActions() {
    $('log').addEventListener('click', ({target}) => {
        const button = target.closest('[data-action]');
        const index = [...$('log').children].indexOf(target.closest('#log > *'));
        if (button) MESSAGE_ACTIONS[button.dataset.action](index, button);
    });
    $('history').addEventListener('click', ({target}) => {
        const button = target.closest('[data-action]');
        if (button) historyAction(button.dataset.action, button.closest('li'));
        else if (target.closest('a')) closeDrawer();
    });
    for (const id of ['new-chat', 'new-chat-top'])
        $(id).addEventListener('click', () => {
            closeDrawer();
            startNew();
        });
    addEventListener('keydown', event => {
        if (event.key !== 'Escape' || $('settings').open) return;
        if (drawerIsOpen()) closeDrawer();
        else stop();
    });
    addEventListener('popstate', openFromAddress);
}

initComposer();
initActions();
initDrawer();
initSettings();
initModels();
store.onOtherTab(refreshHistory);
if (location.hash) openFromAddress();
else draw();
refreshHistory();
