/* sidebar.js - the list of conversations, and the drawer it becomes on a narrow screen. */
import {$, clone, part} from './dom.js';

const DAY = 24 * 60 * 60 * 1000;

function groupOf(updated) {
    const today = new Date().setHours(0, 0, 0, 0);
    if (updated >= today) return 'Today';
    if (updated >= today - DAY) return 'Yesterday';
    if (updated >= today - 7 * DAY) return 'Last seven days';
    return 'Earlier';
}

function itemElement({id, title}, currentId, isRunning) {
    const item = clone('t-item');
    const link = part(item, 'title');
    item.dataset.id = id;
    item.classList.toggle('running', isRunning(id));
    link.textContent = title;
    link.href = `#${id}`;
    if (id === currentId) link.setAttribute('aria-current', 'page');
    return item;
}

let drawn;

/* Draws titles, {id, title, updated} with the latest first, in groups by age. Does nothing when
 * nothing changed, so that the focus stays, nor while a title is being edited. */
export function drawHistory(titles, currentId, isRunning) {
    const nav = $('history');
    const state = JSON.stringify([currentId, titles.map(title => [title, isRunning(title.id)])]);
    if (state === drawn || nav.querySelector('input')) return;
    drawn = state;
    const groups = [];
    let list;
    for (const title of titles) {
        const name = groupOf(title.updated);
        if (list?.getAttribute('aria-label') !== name) {
            const heading = document.createElement('h3');
            heading.textContent = name;
            list = document.createElement('ul');
            list.setAttribute('aria-label', name);
            groups.push(heading, list);
        }
        list.append(itemElement(title, currentId, isRunning));
    }
    nav.replaceChildren(...groups);
}

/* Turns a title into a text field; done(new title) on Enter or on leaving, done(null) on Escape. */
export function editTitle(item, done) {
    const link = part(item, 'title');
    const input = document.createElement('input');
    input.value = link.textContent;
    input.maxLength = 200;
    input.setAttribute('aria-label', 'Title');
    const finish = title => {
        input.onblur = null;
        input.replaceWith(link);
        done(title);
    };
    input.onblur = () => finish(input.value.trim());
    input.onkeydown = event => {
        if (event.isComposing) return;
        if (event.key === 'Enter') finish(input.value.trim());
        if (event.key === 'Escape') finish(null);
        event.stopPropagation();
    };
    link.replaceWith(input);
    input.focus();
    input.select();
}

export const drawerIsOpen = () => document.body.classList.contains('drawer');

export function closeDrawer() {
    if (!drawerIsOpen()) return;
    document.body.classList.remove('drawer');
    $('main').inert = false;
    $('drawer-open').focus();
}

function openDrawer() {
    document.body.classList.add('drawer');
    $('main').inert = true;
    $('drawer-close').focus();
}

export function initDrawer() {
    $('drawer-open').addEventListener('click', openDrawer);
    $('drawer-close').addEventListener('click', closeDrawer);
    $('scrim').addEventListener('click', closeDrawer);
    matchMedia('(min-width: 48rem)').addEventListener('change', closeDrawer);
}
