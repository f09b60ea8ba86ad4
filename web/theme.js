/* theme.js - light, dark, or what the system says. Loaded before the first paint, so that a
 * chosen theme does not flash in late. The palette itself is light-dark() in style.css; what
 * cannot use that (code colours, the browser's own bars) is switched by its media attribute. */
import {settings} from './store.js';

export function applyTheme() {
    const {theme} = settings;
    document.documentElement.dataset.theme = theme;
    for (const element of document.head.querySelectorAll('[data-theme]')) {
        const own = element.dataset.theme;
        if (theme === 'auto') element.media = `(prefers-color-scheme: ${own})`;
        else element.media = theme === own ? 'all' : 'not all';
    }
}

applyTheme();
