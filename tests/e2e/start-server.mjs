/* start-server.mjs - a server of a test's own, with other options than the shared one's. */
import {spawn} from 'node:child_process';
import {readFileSync} from 'node:fs';
import {createInterface} from 'node:readline';

const {GUANACO_SERVER, GUANACO_MODEL, GUANACO_ADAPTERS, GN_TEST_DEVICE} = process.env;

export const adapterOptions = [
    '--adapter', `pirate=${GUANACO_ADAPTERS}/pirate`, '--adapter', `brief=${GUANACO_ADAPTERS}/brief`,
    '--allow-adapter-loading', '--adapter-dir', GUANACO_ADAPTERS,
];

/* Starts the default model on a free port, with at most `files` open files until the server asks for
 * more; it ends with the test. */
export async function startServer(t, options, files = 1024) {
    const server = spawn('sh', [
        '-c', `ulimit -Sn ${files} && exec "$0" "$@"`, GUANACO_SERVER, 'serve', '--port', '0', '--json', '--quiet',
        '--model', GUANACO_MODEL, '--device', GN_TEST_DEVICE || 'cpu', ...options,
    ], {stdio: ['ignore', 'pipe', 'inherit']});
    t.after(() => server.kill());
    for await (const line of createInterface({input: server.stdout})) {
        const {url} = JSON.parse(line);
        if (url) return {url, pid: server.pid};
    }
    throw new Error('the server ended before it was ready');
}

/* The process's memory in MiB: now, or at its most. */
export function memoryOf(pid, field = 'VmRSS') {
    const status = readFileSync(`/proc/${pid}/status`, 'utf8');
    return Number(new RegExp(`${field}:\\s+(\\d+)`).exec(status)[1]) / 1024;
}
