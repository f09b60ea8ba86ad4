/* stream.js - shows a reply while it grows, without rendering all of it over and over.
 *
 * At most once a frame, and never for more than a fifth of the time, the text since the last
 * settled block is rendered; blocks that can no longer change stay in the document untouched. So
 * the work grows with the text and not with its square, and a selection in settled text stays. */
import {render, settledLength} from './markdown.js';

export class StreamView {
    #element;
    #pending = ''; /* text after the settled blocks */
    #settled = 0; /* elements that belong to settled blocks */
    #frame = 0;
    #notBefore = 0;

    constructor(element) {
        this.#element = element;
        element.replaceChildren();
    }

    push(text) {
        this.#pending += text;
        this.#frame ||= requestAnimationFrame(() => this.#paint());
    }

    #paint() {
        this.#frame = 0;
        const start = performance.now();
        if (start < this.#notBefore) {
            this.#frame = requestAnimationFrame(() => this.#paint());
            return;
        }
        const text = this.#pending.replace(/\r\n|\r(?!$)/g, '\n');
        const settled = settledLength(text);
        while (this.#element.childNodes.length > this.#settled) this.#element.lastChild.remove();
        if (settled) {
            this.#element.append(render(text.slice(0, settled)));
            this.#settled = this.#element.childNodes.length;
        }
        this.#pending = text.slice(settled);
        this.#element.append(render(this.#pending));
        this.#element.getBoundingClientRect(); /* layout happens now, so that its time counts */
        this.#notBefore = start + 5 * (performance.now() - start);
    }

    /* The caller now shows the text as a whole: only at its end are all blocks known. */
    close() {
        cancelAnimationFrame(this.#frame);
    }
}

/* Shows text, touching only elements that differ: what is selected or scrolled stays so. */
export function showText(element, text) {
    const fresh = [...render(text).childNodes];
    fresh.forEach((node, index) => {
        const old = element.childNodes[index];
        if (!old) element.append(node);
        else if (!old.isEqualNode(node)) old.replaceWith(node);
    });
    while (element.childNodes.length > fresh.length) element.lastChild.remove();
}
