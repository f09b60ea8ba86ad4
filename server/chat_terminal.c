/* chat_terminal.c - what a chat in the terminal waits for: a line, text from the engine, Ctrl-C. */
#include "server/chat_terminal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

gn_status gn_terminal_open(gn_terminal *t, gn_error *err) {
    sigset_t interrupt;
    *t = (gn_terminal){.signals = -1, .wake = -1};
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    pthread_mutex_init(&t->lock, NULL);
    pthread_sigmask(SIG_BLOCK, &interrupt, NULL);
    t->signals = signalfd(-1, &interrupt, SFD_NONBLOCK | SFD_CLOEXEC);
    t->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    t->interactive = isatty(STDIN_FILENO);
    t->colour = isatty(STDOUT_FILENO) && !getenv("NO_COLOR");
    if (t->signals >= 0 && t->wake >= 0) return GN_OK;
    const int cause = errno;
    gn_terminal_close(t);
    return gn_fail(err, GN_EIO, "cannot watch for signals: %s", strerror(cause));
}

void gn_terminal_close(gn_terminal *t) {
    if (t->signals >= 0) close(t->signals);
    if (t->wake >= 0) close(t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t->input);
    free(t->text);
}

bool gn_terminal_interrupted(gn_terminal *t) {
    struct signalfd_siginfo info;
    bool any = false;
    while (read(t->signals, &info, sizeof info) == (ssize_t)sizeof info) any = true;
    return any;
}

/* Appends to a buffer that grows by doubling; false when memory is short. */
static bool append(char **buffer, size_t *len, size_t *size, const char *bytes, size_t n) {
    if (n > *size - *len) {
        size_t larger = *size ? *size : 4096;
        while (larger - *len < n) larger *= 2;
        char *moved = realloc(*buffer, larger);
        if (!moved) return false;
        *buffer = moved;
        *size = larger;
    }
    memcpy(*buffer + *len, bytes, n);
    *len += n;
    return true;
}

/* Takes the first line out of what was read; at the end of input also one without its newline. */
static bool take_line(gn_terminal *t, char **line) {
    char *newline = t->input_len ? memchr(t->input, '\n', t->input_len) : NULL;
    if (!newline && (!t->input_ended || t->input_len == 0)) return false;
    const size_t length = newline ? (size_t)(newline - t->input) : t->input_len;
    const size_t used = newline ? length + 1 : length;
    *line = strndup(t->input, length);
    memmove(t->input, t->input + used, t->input_len - used);
    t->input_len -= used;
    return *line != NULL;
}

gn_wake gn_terminal_read_line(gn_terminal *t, char **line) {
    char bytes[4096];
    while (!take_line(t, line)) {
        struct pollfd watched[] = {{STDIN_FILENO, POLLIN, 0}, {t->signals, POLLIN, 0}};
        if (t->input_ended) return GN_WAKE_END;
        if (poll(watched, 2, -1) < 0 && errno != EINTR) return GN_WAKE_END;
        if (gn_terminal_interrupted(t)) return GN_WAKE_INTERRUPT;
        if (!(watched[0].revents & (POLLIN | POLLHUP | POLLERR))) continue;
        const ssize_t n = read(STDIN_FILENO, bytes, sizeof bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0 || !append(&t->input, &t->input_len, &t->input_size, bytes, (size_t)n))
            t->input_ended = true;
    }
    return GN_WAKE_LINE;
}

void gn_terminal_on_event(void *user, const gn_event *event) {
    static const uint64_t one = 1;
    gn_terminal *t = user;
    pthread_mutex_lock(&t->lock);
    if (event->text_len &&
        !append(&t->text, &t->text_len, &t->text_size, event->text, event->text_len))
        t->lost = true;
    if (event->finish != GN_FINISH_NONE) {
        t->finished = true;
        t->finish = event->finish;
        if (event->error) t->error = *event->error;
    }
    pthread_mutex_unlock(&t->lock);
    const ssize_t written = write(t->wake, &one, sizeof one); /* full means awake already */
    (void)written;
}

void gn_terminal_expect(gn_terminal *t) {
    t->text_len = 0;
    t->finished = t->lost = false;
    t->finish = GN_FINISH_NONE;
    t->error = (gn_error){0};
}

bool gn_terminal_next_text(gn_terminal *t, char **text, bool *interrupted) {
    uint64_t count;
    *text = NULL;
    pthread_mutex_lock(&t->lock);
    bool ready = t->text_len || t->finished;
    pthread_mutex_unlock(&t->lock);
    if (!ready) {
        struct pollfd watched[] = {{t->wake, POLLIN, 0}, {t->signals, POLLIN, 0}};
        poll(watched, 2, -1);
        const ssize_t n = read(t->wake, &count, sizeof count);
        (void)n;
    }
    *interrupted = gn_terminal_interrupted(t);
    pthread_mutex_lock(&t->lock);
    if (t->text_len) *text = strndup(t->text, t->text_len);
    const bool more = t->text_len || !t->finished;
    t->text_len = 0;
    pthread_mutex_unlock(&t->lock);
    return more;
}
