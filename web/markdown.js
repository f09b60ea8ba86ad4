/* markdown.js - a model's text as elements that are safe to show.
 *
 * Model output is hostile. marked turns it into HTML, in which tags written by the model appear as
 * text; DOMPurify then lets through the few elements and attributes below, and nothing that loads,
 * runs, styles or submits. The Content-Security-Policy stands behind both. */
import {Marked} from './vendor/marked.esm.js';
import hljs from './vendor/highlight.min.js';
import './vendor/purify.min.js';
import {clone, part} from './dom.js';

const PURIFY = {
    ALLOWED_TAGS: [
        ...['p', 'br', 'hr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'blockquote', 'ul', 'ol', 'li'],
        ...['a', 'strong', 'em', 'del', 'b', 'i', 'u', 's', 'sub', 'sup', 'kbd', 'mark'],
        ...['pre', 'code', 'span', 'table', 'thead', 'tbody', 'tr', 'th', 'td'],
    ],
    ALLOWED_ATTR: ['href', 'title', 'start', 'align', 'class'],
    ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
    ADD_URI_SAFE_ATTR: ['start', 'align'], /* their values are not addresses */
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
};

/* Tags that models use in running text and that need no attributes. */
const INLINE_TAG = /^<\/?(?:br|sub|sup|kbd|mark|b|i|u|s)\s*\/?>$/i;

/* Colouring is the slow part: known languages only, and no huge blocks. */
const HIGHLIGHT_LIMIT = 100_000;

const ESCAPES = {'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;'};
const escape = text => text.replace(/[&<>"']/g, character => ESCAPES[character]);

function highlighted(text, language) {
    if (!hljs.getLanguage(language) || text.length > HIGHLIGHT_LIMIT) return escape(text);
    return hljs.highlight(text, {language, ignoreIllegals: true}).value;
}

const marked = new Marked({
    gfm: true,
    breaks: true,
    renderer: {
        code({text, lang}) {
            const language = /^[\w#+.-]*/.exec(lang ?? '')[0];
            const html = highlighted(text, language);
            return `<pre><code class="language-${language}">${html}</code></pre>`;
        },
        html({text, block}) {
            if (INLINE_TAG.test(text.trim())) return text;
            if (!block) return escape(text);
            return `<p>${escape(text.trim()).replaceAll('\n', '<br>')}</p>`;
        },
        /* Fetching a picture would tell its host who reads this. */
        image: ({href, text}) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
        checkbox: ({checked}) => (checked ? '☑ ' : '☐ '),
    },
});

/* Adds what DOMPurify could not let through: link targets, code heads, scrolling tables. */
function decorate(fragment) {
    for (const link of fragment.querySelectorAll('a')) {
        link.target = '_blank';
        link.rel = 'noopener noreferrer';
    }
    for (const pre of fragment.querySelectorAll('pre')) {
        const figure = clone('t-code');
        const language = pre.firstElementChild.className.replace('language-', '');
        part(figure, 'language').textContent = language;
        pre.tabIndex = 0;
        pre.replaceWith(figure);
        figure.append(pre);
    }
    for (const table of fragment.querySelectorAll('table')) {
        const wrapper = document.createElement('div');
        wrapper.className = 'table';
        wrapper.tabIndex = 0;
        table.replaceWith(wrapper);
        wrapper.append(table);
    }
    return fragment;
}

/* Text nested so deep that a parser gives up is shown as it is. */
function plain(text) {
    const paragraph = document.createElement('p');
    paragraph.className = 'as-is';
    paragraph.textContent = text;
    const fragment = document.createDocumentFragment();
    fragment.append(paragraph);
    return fragment;
}

/* Markdown as a fragment. */
export function render(text) {
    try {
        return decorate(window.DOMPurify.sanitize(marked.parse(text), PURIFY));
    } catch {
        return plain(text);
    }
}

/* How many characters at the start of a growing text are blocks that later text cannot change: all
 * but the last block, once that is long enough to show that it is not part of the one before. */
export function settledLength(text) {
    let blocks;
    try {
        blocks = marked.lexer(text);
    } catch {
        return 0;
    }
    const last = blocks.pop();
    if (!last || last.type === 'space' || last.raw.length < 16) return 0;
    return blocks.reduce((length, block) => length + block.raw.length, 0);
}
