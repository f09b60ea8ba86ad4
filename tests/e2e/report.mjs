/* report.mjs - the page of a training run, made by guanaco-trainer at GUANACO_TRAINER, in a real
 * browser: what it shows, and that it fetches nothing. CHROMIUM names the browser. */
import assert from 'node:assert/strict';
import {execFileSync} from 'node:child_process';
import {mkdtemp, rm, writeFile} from 'node:fs/promises';
import {tmpdir} from 'node:os';
import {join} from 'node:path';
import {after, before, test} from 'node:test';
import {pathToFileURL} from 'node:url';
import {chromium} from 'playwright-core';

const STEPS = 40;
const SETTINGS = {lora_r: 64, note: '</script><b id="forged">', target_modules: ['q_proj', 'v_proj']};

let folder;
let browser;

const metricsOf = step => ({
    step,
    loss: 3 - step / 20,
    grad_norm: 0.3,
    learning_rate: 2e-4,
    tok_s: 16000 + step,
    device_bytes: 2 ** 33,
    time: 1.79e9 + 90 * step,
});

before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'guanaco-report-'));
    const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium';
    browser = await chromium.launch({executablePath, args: ['--no-sandbox', '--disable-gpu']});
});

after(async () => {
    await browser?.close();
    await rm(folder, {recursive: true});
});

/* Opens the page of a run of these lines; it must raise no error and fetch nothing. */
async function openReport(lines, options = {}) {
    const text = lines.map(line => `${JSON.stringify(line)}\n`).join('');
    await writeFile(join(folder, 'metrics.jsonl'), text);
    execFileSync(process.env.GUANACO_TRAINER, ['report', '--output-dir', folder]);
    const page = await browser.newPage({viewport: {width: 1200, height: 1400}, ...options});
    const problems = [];
    const url = pathToFileURL(join(folder, 'report.html')).href;
    page.on('pageerror', error => problems.push(error.message));
    page.on('console', message => problems.push(message.text()));
    page.on('request', request => {
        if (request.url() !== url) problems.push(`request to ${request.url()}`);
    });
    await page.goto(url);
    await page.locator('figure svg text').first().waitFor();
    return {page, problems};
}

test('a run is shown, with its values under the pointer', async () => {
    await writeFile(join(folder, 'train_config.json'), JSON.stringify(SETTINGS));
    const lines = Array.from({length: STEPS}, (_, i) => metricsOf(i + 1));
    lines.push({step: STEPS, eval_loss: 1.5, eval_ppl: 4.48});
    const {page, problems} = await openReport(lines);
    const summary = await page.locator('#summary').innerText();
    const words = ['Steps\n40', 'Final loss\n1\n', 'Best evaluation\n1.5\nperplexity 4.48\nat step 40'];
    for (const word of [...words, 'Time\n58 min 30 s', '16,021', '8.00 GiB'])
        assert.ok(summary.includes(word), `${word} in ${summary}`);
    assert.equal(await page.locator('figure').count(), 5);
    assert.equal(await page.locator('figure path').count(), 3 * 2 + 2);

    const loss = page.locator('figure').first();
    const box = await loss.locator('svg').boundingBox();
    await page.mouse.move(box.x + box.width - 14, box.y + 50);
    assert.match(await loss.locator('figcaption').innerText(), /logged 1\s+smoothed 1.0.*1\.5/s);
    const rate = page.locator('figure', {hasText: 'Learning rate'});
    assert.match(await rate.locator('figcaption').innerText(), /2e-4/);
    await page.mouse.move(2, 2);
    assert.doesNotMatch(await rate.locator('figcaption').innerText(), /2e-4/);

    const settings = await page.locator('#settings').innerText();
    assert.match(settings, /lora_r\s+64/);
    assert.match(settings, /<\/script><b id="forged">/);
    assert.equal(await page.locator('#forged').count(), 0);
    assert.deepEqual(problems, []);
    await page.close();
});

test('a run of one step, in the dark, on a phone', async () => {
    await rm(join(folder, 'train_config.json'), {force: true});
    const {page, problems} = await openReport([metricsOf(1)], {
        colorScheme: 'dark',
        viewport: {width: 390, height: 844},
    });
    assert.equal(await page.locator('figure').count(), 5);
    assert.ok(await page.locator('details').isHidden());
    const wide = await page.evaluate('document.documentElement.scrollWidth');
    assert.ok(wide <= 390, `${wide} pixels wide`);
    const ground = await page.evaluate('getComputedStyle(document.body).backgroundColor');
    assert.equal(ground, 'rgb(27, 25, 23)');
    assert.deepEqual(problems, []);
    await page.close();
});
