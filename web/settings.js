/* settings.js - the dialog of settings. A change holds at once; a number out of range is marked
 * and not kept. */
import {$} from './dom.js';
import {drawBlend, refreshModels} from './models.js';
import {saveSettings, settings} from './store.js';
import {applyTheme} from './theme.js';

const SAMPLING =
    'temperature top_p top_k min_p repetition_penalty max_tokens seed'.split(' ');

/* The part of a request that the settings decide. */
export const samplingOf = () =>
    Object.fromEntries(
        SAMPLING.filter(name => settings[name] !== null).map(name => [name, settings[name]]),
    );

function read(input) {
    input.setAttribute('aria-invalid', !input.checkValidity());
    if (!input.checkValidity()) return;
    const value = input.type === 'number' ? input.valueAsNumber : input.value;
    saveSettings({[input.name]: Number.isNaN(value) ? null : value});
    if (input.name === 'theme') applyTheme();
}

function fill(input) {
    if (input.type === 'radio') input.checked = settings[input.name] === input.value;
    else input.value = settings[input.name] ?? '';
    input.setAttribute('aria-invalid', false);
}

export function openSettings() {
    for (const input of $('settings').querySelectorAll('[name]')) fill(input);
    drawBlend();
    $('settings').showModal();
}

export function initSettings() {
    const dialog = $('settings');
    $('open-settings').addEventListener('click', openSettings);
    $('banner-settings').addEventListener('click', openSettings);
    dialog.addEventListener('input', ({target}) => target.name && read(target));
    dialog.addEventListener('close', refreshModels);
    /* A press on the backdrop has the dialog itself as its target; the form fills the rest. */
    dialog.addEventListener('pointerdown', ({target}) => target === dialog && dialog.close());
    /* Enter in a field would press the first button, which closes. */
    dialog.addEventListener('keydown', event => {
        if (event.key === 'Enter' && event.target.tagName === 'INPUT') event.preventDefault();
    });
}
