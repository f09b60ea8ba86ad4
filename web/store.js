/* store.js - what the browser keeps: settings in localStorage, conversations in IndexedDB.
 *
 * A conversation is {id, title, created, updated, messages}. A message is {role: 'user', content}
 * or {role: 'assistant', versions, shown}: every regeneration adds a version, {content, model,
 * adapters, finish, error, usage, speed}, so answers of different adapters can be compared.
 * The list of titles has a store of its own: drawing the sidebar must not read every message.
 * Every function rejects when the browser cannot keep things (full, private window, ...). */

const SETTINGS_KEY = 'guanaco.settings';

const DEFAULTS = {
    theme: 'auto',
    system: '',
    apiKey: '',
    temperature: null, /* null: the server's default */
    top_p: null,
    top_k: null,
    min_p: null,
    repetition_penalty: null,
    max_tokens: null,
    seed: null,
    choice: '', /* id of the model for the next message, or BLEND */
    blend: {}, /* adapter id -> scale */
};

function readSettings() {
    try {
        return {...DEFAULTS, ...JSON.parse(localStorage.getItem(SETTINGS_KEY))};
    } catch {
        return {...DEFAULTS};
    }
}

export const settings = readSettings();

/* Changes hold for this visit even where they cannot be kept. */
export function saveSettings(changes) {
    Object.assign(settings, changes);
    try {
        localStorage.setItem(SETTINGS_KEY, JSON.stringify(settings));
    } catch (error) {
        console.warn('Settings were not kept:', error.message);
    }
}

const promised = request =>
    new Promise((resolve, reject) => {
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
    });

/* Other tabs show the same history: they hear of each change. */
const channel = new BroadcastChannel('guanaco.history');

export const onOtherTab = listener => channel.addEventListener('message', listener);

let opened;

function database() {
    opened ??= new Promise((resolve, reject) => {
        const request = indexedDB.open('guanaco', 1);
        request.onupgradeneeded = () => {
            request.result.createObjectStore('conversations', {keyPath: 'id'});
            request.result.createObjectStore('titles', {keyPath: 'id'});
        };
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
    });
    return opened;
}

/* Runs change(conversations, titles) as one transaction; settles when it is on disk or undone. */
async function write(change) {
    const transaction = (await database()).transaction(['conversations', 'titles'], 'readwrite');
    const done = new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error ?? new Error('aborted'));
    });
    try {
        change(transaction.objectStore('conversations'), transaction.objectStore('titles'));
    } catch (error) {
        transaction.abort();
        done.catch(() => {});
        throw error;
    }
    await done;
    channel.postMessage('changed');
}

/* {id, title, updated} of every conversation, the latest first. */
export async function listTitles() {
    const titles = await promised(
        (await database()).transaction('titles').objectStore('titles').getAll(),
    );
    return titles.sort((a, b) => b.updated - a.updated);
}

/* The conversation, or undefined. */
export async function loadConversation(id) {
    const store = (await database()).transaction('conversations').objectStore('conversations');
    return promised(store.get(id));
}

export function saveConversation(conversation) {
    const {id, title, updated} = conversation;
    return write((conversations, titles) => {
        conversations.put(conversation);
        titles.put({id, title, updated});
    });
}

export function deleteConversation(id) {
    return write((conversations, titles) => {
        conversations.delete(id);
        titles.delete(id);
    });
}

/* randomUUID is missing on plain http. */
const newId = () =>
    Array.from(crypto.getRandomValues(new Uint8Array(9)), byte => byte.toString(36)).join('');

export function newConversation() {
    const now = Date.now();
    return {id: newId(), title: 'New chat', created: now, updated: now, messages: []};
}

/* The text of a message that is shown and sent. */
export const contentOf = message =>
    message.role === 'user' ? message.content : message.versions[message.shown].content;

/* How a version is labelled: the model that answered, or the adapters blended for it. */
export const labelOf = ({model, adapters}) =>
    adapters ? adapters.map(({name, scale}) => `${name} × ${scale}`).join(' + ') : model;

/* A conversation as a file for other programs: messages as the API has them, plus the model. */
export function exportConversation({title, created, updated, messages}) {
    const flat = message => {
        if (message.role === 'user') return message;
        const [shown, ...others] = [
            message.versions[message.shown],
            ...message.versions.filter((_, index) => index !== message.shown),
        ].map(({content, model, adapters}) => ({content, model, adapters}));
        return {role: 'assistant', ...shown, alternatives: others.length ? others : undefined};
    };
    const file = {
        title,
        created: new Date(created).toISOString(),
        updated: new Date(updated).toISOString(),
        messages: messages.map(flat),
    };
    return JSON.stringify(file, null, 2);
}
