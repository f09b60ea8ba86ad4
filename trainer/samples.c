/* samples.c - growing arrays of samples, and the cache file.
 *
 * The file is a header, the four arrays and a hash of all before it, in the machine's byte order
 * (which the header's magic number shows). */
#include "trainer/samples.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/save_folder.h"
#include "trainer/trainer.h"

void gn_samples_free(gn_samples *s) {
    free(s->ids);
    free(s->labels);
    free(s->starts);
    free(s->lines);
    *s = (gn_samples){0};
}

/* ---- growing ---- */

static gn_status grow(void **array, int64_t room, size_t size) {
    void *grown = realloc(*array, (size_t)room * size);
    if (!grown) return GN_ENOMEM;
    *array = grown;
    return GN_OK;
}

gn_status gn_samples_reserve(gn_samples *s, int64_t n) {
    if (n <= s->token_room - s->n_tokens) return GN_OK;
    const int64_t room = 2 * (s->n_tokens + n) + 256;
    gn_status status = grow((void **)&s->ids, room, sizeof *s->ids);
    if (!status) status = grow((void **)&s->labels, room, sizeof *s->labels);
    if (!status) s->token_room = room;
    return status;
}

static gn_status reserve_samples(gn_samples *s, int64_t n) {
    if (s->starts && n <= s->room - s->n) return GN_OK;
    const int64_t room = 2 * (s->n + n) + 16;
    const bool first = !s->starts;
    gn_status status = grow((void **)&s->starts, room + 1, sizeof *s->starts);
    if (!status && first) s->starts[0] = 0;
    if (!status) status = grow((void **)&s->lines, room, sizeof *s->lines);
    if (!status) s->room = room;
    return status;
}

gn_status gn_samples_commit(gn_samples *s, int64_t n, int64_t line) {
    const gn_status status = reserve_samples(s, 1);
    if (status) return status;
    for (int64_t i = s->n_tokens; i < s->n_tokens + n; i++)
        s->counts.learned += s->labels[i] != GN_NOT_LEARNED;
    s->n_tokens += n;
    s->lines[s->n++] = line;
    s->starts[s->n] = s->n_tokens;
    return GN_OK;
}

gn_status gn_samples_append(gn_samples *s, const gn_samples *other) {
    gn_status status = gn_samples_reserve(s, other->n_tokens);
    if (!status) status = reserve_samples(s, other->n);
    if (status) return status;
    const size_t bytes = (size_t)other->n_tokens * sizeof *s->ids;
    if (bytes) {
        memcpy(s->ids + s->n_tokens, other->ids, bytes);
        memcpy(s->labels + s->n_tokens, other->labels, bytes);
    }
    for (int64_t i = 0; i < other->n; i++) {
        s->lines[s->n + i] = other->lines[i];
        s->starts[s->n + i + 1] = s->n_tokens + other->starts[i + 1];
    }
    s->n += other->n;
    s->n_tokens += other->n_tokens;
    s->counts.rows += other->counts.rows;
    s->counts.bad_rows += other->counts.bad_rows;
    s->counts.left_out += other->counts.left_out;
    s->counts.truncated += other->counts.truncated;
    s->counts.learned += other->counts.learned;
    return GN_OK;
}

/* ---- the cache ---- */

static const uint64_t magic = 0x31304c504d53474eu; /* "NGSMPL01" */

typedef struct cache_header {
    uint64_t magic;
    gn_hash key;
    int64_t n, n_tokens;
    gn_sample_counts counts;
} cache_header;

/* What follows the header. */
typedef struct cache_part {
    void *data;
    size_t bytes;
} cache_part;
enum { CACHE_PARTS = 4 };

static void list_parts(const gn_samples *s, cache_part *parts) {
    parts[0] = (cache_part){s->starts, ((size_t)s->n + 1) * sizeof *s->starts};
    parts[1] = (cache_part){s->lines, (size_t)s->n * sizeof *s->lines};
    parts[2] = (cache_part){s->ids, (size_t)s->n_tokens * sizeof *s->ids};
    parts[3] = (cache_part){s->labels, (size_t)s->n_tokens * sizeof *s->labels};
}

static gn_hash hash_all(const cache_header *header, const cache_part *parts) {
    gn_hash hash = GN_HASH_INIT;
    gn_hash_add(&hash, header, sizeof *header);
    for (int i = 0; i < CACHE_PARTS; i++) gn_hash_add(&hash, parts[i].data, parts[i].bytes);
    return hash;
}

static char *cache_path(const char *dir, const gn_hash *key, const char *suffix) {
    char *path;
    const int n = asprintf(&path, "%s/%016" PRIx64 "%016" PRIx64 ".samples%s", dir, key->h[0],
                           key->h[1], suffix);
    return n < 0 ? NULL : path;
}

/* Whether the lengths in the header are those of a file of this size. */
static bool lengths_fit(const cache_header *h, int64_t size) {
    if (h->n < 1 || h->n > size / 16 || h->n_tokens < 0 || h->n_tokens > size / 8) return false;
    const int64_t arrays = 8 * (h->n + 1) + 8 * h->n + 8 * h->n_tokens;
    return size == (int64_t)sizeof *h + arrays + (int64_t)sizeof(gn_hash);
}

static bool is_label(int32_t label, int vocab) {
    return label == GN_NOT_LEARNED || (label >= 0 && label < vocab);
}

static bool contents_fit(const gn_samples *s, int vocab) {
    if (s->starts[0] != 0 || s->starts[s->n] != s->n_tokens) return false;
    for (int64_t i = 0; i < s->n; i++)
        if (s->starts[i + 1] <= s->starts[i] || s->starts[i + 1] > s->n_tokens) return false;
    for (int64_t i = 0; i < s->n_tokens; i++)
        if (s->ids[i] < 0 || s->ids[i] >= vocab || !is_label(s->labels[i], vocab)) return false;
    return true;
}

static gn_status read_open(gn_samples *s, FILE *file, const gn_hash *key, int vocab) {
    cache_header header;
    cache_part parts[CACHE_PARTS];
    gn_hash stored;
    struct stat info;
    if (fstat(fileno(file), &info) != 0) return GN_EIO;
    if (fread(&header, sizeof header, 1, file) != 1 || header.magic != magic ||
        memcmp(&header.key, key, sizeof *key) || !lengths_fit(&header, info.st_size))
        return GN_EFORMAT;
    gn_status status = gn_samples_reserve(s, header.n_tokens);
    if (!status) status = reserve_samples(s, header.n);
    if (status) return status;
    s->n = header.n;
    s->n_tokens = header.n_tokens;
    s->counts = header.counts;
    list_parts(s, parts);
    for (int i = 0; i < CACHE_PARTS; i++)
        if (fread(parts[i].data, 1, parts[i].bytes, file) != parts[i].bytes) return GN_EFORMAT;
    if (fread(&stored, sizeof stored, 1, file) != 1) return GN_EFORMAT;
    const gn_hash hash = hash_all(&header, parts);
    return !memcmp(&hash, &stored, sizeof hash) && contents_fit(s, vocab) ? GN_OK : GN_EFORMAT;
}

gn_status gn_samples_read(gn_samples *s, const char *dir, const gn_hash *key, int vocab,
                          gn_error *err) {
    *s = (gn_samples){0};
    char *path = cache_path(dir, key, "");
    FILE *file = path ? fopen(path, "rbe") : NULL;
    gn_status status;
    if (!path)
        status = gn_fail(err, GN_ENOMEM, "out of memory");
    else if (!file)
        status =
            gn_fail(err, errno == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", path, strerror(errno));
    else if ((status = read_open(s, file, key, vocab)) != GN_OK)
        status = gn_fail(err, status, "%s: %s", path, gn_status_text(status));
    if (file) fclose(file);
    if (status) gn_samples_free(s);
    free(path);
    return status;
}

static bool write_open(const gn_samples *s, FILE *file, const gn_hash *key) {
    const cache_header header = {magic, *key, s->n, s->n_tokens, s->counts};
    cache_part parts[CACHE_PARTS];
    list_parts(s, parts);
    const gn_hash hash = hash_all(&header, parts);
    bool ok = fwrite(&header, sizeof header, 1, file) == 1;
    for (int i = 0; ok && i < CACHE_PARTS; i++)
        ok = fwrite(parts[i].data, 1, parts[i].bytes, file) == parts[i].bytes;
    return ok && fwrite(&hash, sizeof hash, 1, file) == 1 && fflush(file) == 0 &&
           fsync(fileno(file)) == 0;
}

static gn_status write_file(const gn_samples *s, const char *path, char *temporary,
                            const gn_hash *key, gn_error *err) {
    const int fd = mkstemp(temporary);
    FILE *file = fd >= 0 ? fdopen(fd, "wb") : NULL;
    if (!file) {
        const gn_status status = gn_fail(err, GN_EIO, "%s: %s", temporary, strerror(errno));
        if (fd >= 0) {
            close(fd);
            unlink(temporary);
        }
        return status;
    }
    const bool written = write_open(s, file, key);
    if (fclose(file) == 0 && written && rename(temporary, path) == 0) return GN_OK;
    const gn_status status = gn_fail(err, GN_EIO, "%s: %s", path, strerror(errno));
    unlink(temporary);
    return status;
}

gn_status gn_samples_write(const gn_samples *s, const char *dir, const gn_hash *key,
                           gn_error *err) {
    gn_status status = gn_folder_make(dir, err);
    if (status) return status;
    char *path = cache_path(dir, key, ""), *temporary = cache_path(dir, key, ".XXXXXX");
    status = path && temporary ? write_file(s, path, temporary, key, err)
                               : gn_fail(err, GN_ENOMEM, "out of memory");
    free(path);
    free(temporary);
    return status;
}
