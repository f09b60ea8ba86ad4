/* models.js - which models the server has, the picker beside the message, and the blend. */
import {ApiError, listModels} from './api.js';
import {$, clone, part} from './dom.js';
import {labelOf, saveSettings, settings} from './store.js';

/* The picker's value for the blend; no adapter's name has a slash in front. */
const BLEND = '/blend';

let models = [];
let retryTimer;
let delay;

const base = () => models.find(model => !model.parent) ?? models[0];
const adapters = () => models.filter(model => model.parent);

/* The blend's part of a request, of those adapters the server has now. */
const blended = () =>
    adapters()
        .filter(({id}) => settings.blend[id])
        .map(({id}) => ({name: id, scale: settings.blend[id]}));

/* What the next message asks for: {model} or {model, adapters}. */
export function chosen() {
    const value = $('picker').value;
    if (value === BLEND) return {model: base().id, adapters: blended()};
    return {model: value};
}

function option(value, text) {
    const element = document.createElement('option');
    element.value = value;
    element.textContent = text;
    return element;
}

export function drawPicker() {
    const picker = $('picker');
    const groups = [];
    for (const {id, parent} of models) if (!parent) groups.push(option(id, id));
    if (adapters().length) {
        const group = document.createElement('optgroup');
        group.label = 'Adapters';
        group.append(...adapters().map(({id}) => option(id, id)));
        if (blended().length) group.append(option(BLEND, labelOf({adapters: blended()})));
        groups.push(group);
    }
    picker.replaceChildren(...groups);
    picker.disabled = models.length === 0;
    if (models.length === 0) picker.append(option('', 'No model'));
    picker.value = settings.choice;
    if (picker.selectedIndex < 0) picker.value = base()?.id ?? '';
}

/* A row per adapter in the settings; a scale of zero leaves it out. */
export function drawBlend() {
    $('blend').hidden = adapters().length === 0;
    const rows = adapters().map(({id}) => {
        const row = clone('t-blend');
        const [range, output] = [row.querySelector('input'), row.querySelector('output')];
        const show = () => (output.textContent = range.value === '0' ? 'off' : `× ${range.value}`);
        part(row, 'name').textContent = id;
        range.value = settings.blend[id] ?? 0;
        range.addEventListener('input', () => {
            show();
            saveSettings({blend: {...settings.blend, [id]: Number(range.value)}});
            drawPicker();
        });
        show();
        return row;
    });
    $('blend-rows').replaceChildren(...rows);
}

function showBanner(text, needsKey = false) {
    $('banner').hidden = !text;
    $('banner').children[1].textContent = text;
    $('banner-settings').hidden = !needsKey;
}

/* Says that the server does not answer, and asks again, less and less often, until it does. */
export function reportProblem(error) {
    if (error.status === 401 || error.status === 403) {
        showBanner(settings.apiKey ? error.message : 'This server asks for an API key.', true);
        return;
    }
    if (error.status !== 0) {
        showBanner(error.message);
        return;
    }
    showBanner('The server cannot be reached. Trying again …');
    clearTimeout(retryTimer);
    delay = Math.min((delay ?? 1000) * 1.5, 5000);
    retryTimer = setTimeout(refreshModels, delay);
}

export async function refreshModels() {
    let fresh;
    try {
        fresh = await listModels(settings.apiKey);
    } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        reportProblem(error);
        return;
    }
    delay = undefined;
    clearTimeout(retryTimer);
    showBanner('');
    if (JSON.stringify(fresh) === JSON.stringify(models)) return;
    models = fresh;
    drawPicker();
}

export function initModels() {
    drawPicker();
    refreshModels();
    $('picker').addEventListener('change', () => saveSettings({choice: $('picker').value}));
    /* Adapters come and go while the page is open. */
    addEventListener('focus', refreshModels);
    $('picker').addEventListener('focus', refreshModels);
}
