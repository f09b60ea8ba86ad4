/* messages.js - one message of a conversation as an element. Buttons only carry a data-action;
 * app.js hears them all in one place. */
import {$, clone, fit, part} from './dom.js';
import {labelOf} from './store.js';
import {showText} from './stream.js';

function noteOf({finish, error}) {
    if (error) return '';
    if (finish === 'stopped') return 'Stopped.';
    if (finish === 'length') return 'Cut off at the limit of tokens.';
    if (finish === 'interrupted') return 'Interrupted: the page was closed while this was written.';
    return '';
}

function statsOf({usage, speed}) {
    const tokens = usage?.completion_tokens;
    if (!tokens) return '';
    const count = tokens === 1 ? '1 token' : `${tokens} tokens`;
    return speed ? `${count} · ${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : count;
}

/* place is {running, isLast, busy}: whether this reply is being written, is the last message, and
 * whether any reply of this conversation is. */
function updateReply(element, message, {running, isLast, busy}) {
    const version = message.versions[message.shown];
    const label = labelOf(version) || 'Guanaco';
    const button = action => element.querySelector(`[data-action="${action}"]`);
    element.setAttribute('aria-label', `Reply by ${label}`);
    element.setAttribute('aria-busy', running);
    part(element, 'model').textContent = label;
    part(element, 'text').classList.toggle('growing', running);
    part(element, 'waiting').hidden = !running || version.content !== '';
    part(element, 'note').textContent = noteOf(version);
    part(element, 'note').hidden = running || noteOf(version) === '';
    part(element, 'reason').textContent = version.error ?? '';
    part(element, 'error').hidden = running || !version.error;
    const again = isLast && !busy;
    button('retry').hidden = !again;

    part(element, 'actions').hidden = running;
    part(element, 'versions').hidden = message.versions.length < 2;
    part(element, 'position').textContent = `${message.shown + 1}/${message.versions.length}`;
    button('previous').disabled = message.shown === 0;
    button('next').disabled = message.shown === message.versions.length - 1;
    button('copy').hidden = version.content === '';
    button('regenerate').hidden = !again || (version.error && version.content === '');
    part(element, 'stats').textContent = statsOf(version);

    if (running || rendered.get(element) === version) return;
    showText(part(element, 'text'), version.content);
    rendered.set(element, version);
}

const elements = new WeakMap(); /* message -> its element, made once: markdown costs time */
const rendered = new WeakMap(); /* element of a reply -> the version whose text it shows */

/* The element of a message, brought up to date. The text of a running reply is left to its
 * StreamView. */
export function elementOf(message, place) {
    const isUser = message.role === 'user';
    let element = elements.get(message);
    if (!element) {
        element = clone(isUser ? 't-user' : 't-reply');
        elements.set(message, element);
    }
    if (!isUser) updateReply(element, message, place);
    else if (part(element, 'text')) {
        part(element, 'text').textContent = message.content;
        element.querySelector('[data-action="edit"]').disabled = place.busy;
    }
    return element;
}

/* Puts a form into the element of a user message; cancelEdit takes it out again. */
export function editMessage(message, isLast) {
    const form = clone('t-edit');
    const area = form.querySelector('textarea');
    area.value = message.content;
    part(form, 'warning').hidden = isLast;
    elements.get(message).replaceChildren(form);
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
    return form;
}

export const cancelEdit = message => elements.delete(message);

/* Keeps the newest text in view, but only while the reader is at the bottom. */
export function pinToBottom() {
    const scroller = $('scroller');
    let pinned = true;
    let top = 0;
    const distance = () => scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;
    const toBottom = () => {
        pinned = true;
        scroller.scrollTop = scroller.scrollHeight;
        $('to-bottom').hidden = true;
    };
    scroller.addEventListener('scroll', () => {
        /* Growing text never moves the top: upwards is the reader, or text that got shorter. */
        if (scroller.scrollTop < top && distance() > 4) pinned = false;
        else if (distance() < 24) pinned = true;
        top = scroller.scrollTop;
        $('to-bottom').hidden = pinned;
    });
    const observer = new ResizeObserver(() => pinned && toBottom());
    observer.observe(scroller);
    observer.observe($('log'));
    $('to-bottom').addEventListener('click', toBottom);
    return toBottom;
}
