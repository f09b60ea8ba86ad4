/* train_metrics.c - a file that grows by whole lines, each written at once. */
#include "trainer/train_metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

struct gn_metrics {
    char *path;
    int fd;
    int64_t bytes;
};

static gn_status failed(const gn_metrics *m, gn_error *err) {
    return gn_fail(err, GN_EIO, "%s: %s", m->path, strerror(errno));
}

static gn_status open_at(gn_metrics *m, int64_t bytes, gn_error *err) {
    m->fd = open(m->path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (m->fd < 0) return failed(m, err);
    if (flock(m->fd, LOCK_EX | LOCK_NB) != 0)
        return gn_fail(err, GN_EBUSY, "%s: another process is training here", m->path);
    const off_t end = lseek(m->fd, 0, SEEK_END);
    m->bytes = end < bytes ? end : bytes;
    if (end < 0 || ftruncate(m->fd, m->bytes) != 0 || lseek(m->fd, m->bytes, SEEK_SET) < 0)
        return failed(m, err);
    return GN_OK;
}

gn_status gn_metrics_open(gn_metrics **out, const char *output, int64_t bytes, gn_error *err) {
    *out = NULL;
    gn_metrics *m = calloc(1, sizeof *m);
    if (!m || asprintf(&m->path, "%s/metrics.jsonl", output) < 0) {
        free(m);
        return gn_fail(err, GN_ENOMEM, "out of memory");
    }
    const gn_status status = open_at(m, bytes, err);
    if (status)
        gn_metrics_close(m);
    else
        *out = m;
    return status;
}

void gn_metrics_close(gn_metrics *m) {
    if (!m) return;
    if (m->fd >= 0) close(m->fd);
    free(m->path);
    free(m);
}

/* A line that does not fit on the disk is taken back. */
static gn_status append(gn_metrics *m, const char *text, gn_error *err) {
    const size_t length = strlen(text);
    size_t done = 0;
    while (done < length) {
        const ssize_t n = write(m->fd, text + done, length - done);
        if (n > 0) {
            done += (size_t)n;
        } else if (errno != EINTR) {
            const gn_status status = failed(m, err);
            const int undone = ftruncate(m->fd, m->bytes);
            (void)undone; /* half a line is cut off when the run goes on */
            return status;
        }
    }
    m->bytes += (int64_t)length;
    return GN_OK;
}

gn_status gn_metrics_write_take(gn_metrics *m, cJSON *line, bool print, gn_error *err) {
    char *json = line ? cJSON_PrintUnformatted(line) : NULL, *text = NULL;
    cJSON_Delete(line);
    if (!json || asprintf(&text, "%s\n", json) < 0) {
        cJSON_free(json);
        return gn_fail(err, GN_ENOMEM, "out of memory");
    }
    cJSON_free(json);
    const gn_status status = append(m, text, err);
    if (print) {
        fputs(text, stdout);
        fflush(stdout);
    }
    free(text);
    return status;
}

gn_status gn_metrics_sync(gn_metrics *m, int64_t *bytes, gn_error *err) {
    *bytes = m->bytes;
    return fsync(m->fd) == 0 ? GN_OK : failed(m, err);
}
