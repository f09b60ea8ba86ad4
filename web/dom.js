/* dom.js - the few helpers every other module uses on the document. */

export const $ = id => document.getElementById(id);

/* A copy of the element inside <template id=...>. */
export const clone = id => $(id).content.firstElementChild.cloneNode(true);

/* The descendant marked data-part=NAME. */
export const part = (element, name) => element.querySelector(`[data-part="${name}"]`);

/* Speaks to screen readers only. */
export const announce = text => ($('announcer').textContent = text);

/* Textareas grow with their text; CSS does it where field-sizing exists. */
export function fit(textarea) {
    if (CSS.supports('field-sizing', 'content')) return;
    textarea.style.height = 'auto';
    textarea.style.height = `${textarea.scrollHeight}px`;
}

/* The clipboard API exists only on https and localhost; a server on the local network is
 * reached over plain http, where the old command still works. */
export async function copyText(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.createElement('textarea');
    area.value = text;
    area.className = 'hidden';
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    if (!done) throw new Error('the browser refused');
}

/* Copies and lets the button say so: an icon turns into a tick, a word into "Copied". */
export async function copyFrom(button, text) {
    try {
        await copyText(text);
    } catch {
        toast('The browser did not allow copying.');
        return;
    }
    announce('Copied');
    const use = button.querySelector('use');
    if (use) use.setAttribute('href', '#i-check');
    else button.textContent = 'Copied';
    setTimeout(() => {
        if (use) use.setAttribute('href', '#i-copy');
        else button.textContent = 'Copy';
    }, 1500);
}

let toastTimer;

/* A line at the bottom for a few seconds, with an Undo button if undo is given. */
export function toast(text, undo) {
    const [line, button] = $('toast').children;
    const hide = () => ($('toast').hidden = true);
    line.textContent = text;
    button.hidden = !undo;
    button.onclick = () => {
        hide();
        undo();
    };
    $('toast').hidden = false;
    clearTimeout(toastTimer);
    toastTimer = setTimeout(hide, 8000);
}

export function download(name, type, text) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], {type}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
