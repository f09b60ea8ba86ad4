/* zip.c - reads the directory at the end of a zip file and checks it against the entries' own
 * headers. Checksums are not verified: torch itself may leave them out. */
#include "engine/zip.h"

#include <stdlib.h>
#include <string.h>

#include "engine/bytes.h"

enum {
    END_SIZE = 22, /* end of central directory, without its comment */
    END64_LOCATOR_SIZE = 20,
    END64_SIZE = 56,
    DIRECTORY_SIZE = 46, /* one directory entry, without name, extra field and comment */
    LOCAL_SIZE = 30,
    MAX_COMMENT = 65535,
};

static const unsigned char END_MAGIC[4] = {'P', 'K', 5, 6}, END64_MAGIC[4] = {'P', 'K', 6, 6},
                           END64_LOCATOR_MAGIC[4] = {'P', 'K', 6, 7},
                           DIRECTORY_MAGIC[4] = {'P', 'K', 1, 2}, LOCAL_MAGIC[4] = {'P', 'K', 3, 4};

typedef struct {
    const unsigned char *data;
    size_t bytes;
    const char *path;
    gn_error *err;
    uint64_t count, offset, size, end; /* of the directory; it ends at or before `end` */
} reader;

static gn_status damaged(const reader *r, const char *what) {
    return gn_fail(r->err, GN_EFORMAT, "%s: damaged zip file: %s", r->path, what);
}

static bool is(const unsigned char *p, const unsigned char magic[4]) {
    return memcmp(p, magic, 4) == 0;
}

/* The end record stands at the very end, followed only by its comment. */
static bool find_end(const reader *r, size_t *at) {
    if (r->bytes < END_SIZE) return false;
    const size_t last = r->bytes - END_SIZE;
    const size_t first = last > MAX_COMMENT ? last - MAX_COMMENT : 0;
    for (size_t i = last + 1; i-- > first;) {
        if (is(r->data + i, END_MAGIC) && gn_le16(r->data + i + 20) == last - i) {
            *at = i;
            return true;
        }
    }
    return false;
}

static gn_status read_end64(reader *r, const unsigned char *locator, uint64_t locator_at) {
    const uint64_t at = gn_le64(locator + 8);
    if (gn_le32(locator + 4) != 0 || gn_le32(locator + 16) > 1)
        return gn_fail(r->err, GN_EUNSUPPORTED, "%s: a zip file in several volumes", r->path);
    if (!gn_within(at, END64_SIZE, locator_at) || !is(r->data + at, END64_MAGIC))
        return damaged(r, "the zip64 end record is not where its locator says");
    const unsigned char *p = r->data + at;
    r->count = gn_le64(p + 32);
    r->size = gn_le64(p + 40);
    r->offset = gn_le64(p + 48);
    r->end = at;
    return GN_OK;
}

static gn_status read_end(reader *r) {
    size_t at;
    if (!find_end(r, &at)) return damaged(r, "the directory at its end is missing (cut short?)");
    const unsigned char *p = r->data + at;
    if (gn_le16(p + 4) != 0 || gn_le16(p + 6) != 0)
        return gn_fail(r->err, GN_EUNSUPPORTED, "%s: a zip file in several volumes", r->path);
    r->count = gn_le16(p + 10);
    r->size = gn_le32(p + 12);
    r->offset = gn_le32(p + 16);
    r->end = at;
    if (at >= END64_LOCATOR_SIZE && is(p - END64_LOCATOR_SIZE, END64_LOCATOR_MAGIC)) {
        const gn_status status = read_end64(r, p - END64_LOCATOR_SIZE, at - END64_LOCATOR_SIZE);
        if (status) return status;
    }
    if (!gn_within(r->offset, r->size, r->end))
        return damaged(r, "its directory reaches past its end");
    if (r->count > r->size / DIRECTORY_SIZE)
        return damaged(r, "its directory is too small for its number of entries");
    return GN_OK;
}

/* The zip64 extra field holds, in this order, those of size, stored size and offset that did not
 * fit their 32 bits. */
static bool read_extra64(const unsigned char *extra, size_t len, uint64_t *fields[3]) {
    while (len >= 4) {
        const size_t id = gn_le16(extra), size = gn_le16(extra + 2);
        if (size > len - 4) return false;
        if (id == 1) {
            size_t used = 0;
            for (int i = 0; i < 3; i++) {
                if (*fields[i] != UINT32_MAX) continue;
                if (size - used < 8) return false;
                *fields[i] = gn_le64(extra + 4 + used);
                used += 8;
            }
            return true;
        }
        extra += 4 + size;
        len -= 4 + size;
    }
    return *fields[0] != UINT32_MAX && *fields[1] != UINT32_MAX && *fields[2] != UINT32_MAX;
}

/* The local header tells where the bytes begin. Its sizes may be zero (a data descriptor follows
 * the bytes then), so the directory's count. */
static gn_status locate(const reader *r, gn_zip_entry *entry) {
    if (!gn_within(entry->header, LOCAL_SIZE, r->offset) ||
        !is(r->data + entry->header, LOCAL_MAGIC))
        return damaged(r, "an entry's header is not where the directory says");
    const unsigned char *p = r->data + entry->header;
    const size_t name_len = gn_le16(p + 26), extra_len = gn_le16(p + 28);
    entry->data = entry->header + LOCAL_SIZE + name_len + extra_len;
    if (!gn_within(entry->data, entry->bytes, r->offset))
        return damaged(r, "an entry reaches past the end of the data");
    if (name_len != entry->name_len || memcmp(p + LOCAL_SIZE, entry->name, name_len) != 0)
        return damaged(r, "an entry's header and the directory name it differently");
    return GN_OK;
}

/* Reads the directory entry at `at` and steps over it. */
static gn_status read_entry(const reader *r, uint64_t *at, gn_zip_entry *entry) {
    const uint64_t left = r->offset + r->size - *at;
    const unsigned char *p = r->data + *at;
    if (left < DIRECTORY_SIZE || !is(p, DIRECTORY_MAGIC))
        return damaged(r, "its directory holds something that is no entry");
    const uint16_t flags = gn_le16(p + 8), method = gn_le16(p + 10);
    const size_t name_len = gn_le16(p + 28), extra_len = gn_le16(p + 30);
    const size_t total = DIRECTORY_SIZE + name_len + extra_len + gn_le16(p + 32);
    uint64_t stored = gn_le32(p + 20), size = gn_le32(p + 24), header = gn_le32(p + 42);
    uint64_t *fields[3] = {&size, &stored, &header};
    if (left < total) return damaged(r, "a directory entry is cut short");
    if (!read_extra64(p + DIRECTORY_SIZE + name_len, extra_len, fields))
        return damaged(r, "an entry's extra field is malformed");
    if (flags & 1) return gn_fail(r->err, GN_EUNSUPPORTED, "%s: an encrypted zip file", r->path);
    if (method != 0)
        return gn_fail(r->err, GN_EUNSUPPORTED,
                       "%s: a compressed zip file (torch.save stores its entries as they are)",
                       r->path);
    if (stored != size) return damaged(r, "an entry's two sizes differ");
    *entry = (gn_zip_entry){.name = (const char *)p + DIRECTORY_SIZE,
                            .name_len = name_len,
                            .header = header,
                            .bytes = size};
    *at += total;
    return locate(r, entry);
}

static int by_place(const void *a, const void *b) {
    const gn_zip_entry *x = a, *y = b;
    return (x->header > y->header) - (x->header < y->header);
}

static int compare_names(const char *a, size_t a_len, const char *b, size_t b_len) {
    const int order = memcmp(a, b, a_len < b_len ? a_len : b_len);
    return order ? order : (a_len > b_len) - (a_len < b_len);
}

static int by_name(const void *a, const void *b) {
    const gn_zip_entry *x = a, *y = b;
    return compare_names(x->name, x->name_len, y->name, y->name_len);
}

static gn_status check_apart(const reader *r, gn_zip *zip) {
    qsort(zip->entries, zip->count, sizeof *zip->entries, by_place);
    for (size_t i = 1; i < zip->count; i++) {
        const gn_zip_entry *before = &zip->entries[i - 1];
        if (before->data + before->bytes > zip->entries[i].header)
            return damaged(r, "two of its entries overlap");
    }
    qsort(zip->entries, zip->count, sizeof *zip->entries, by_name);
    for (size_t i = 1; i < zip->count; i++) {
        if (by_name(&zip->entries[i - 1], &zip->entries[i]) == 0)
            return damaged(r, "two of its entries have the same name");
    }
    return GN_OK;
}

static gn_status read_directory(const reader *r, gn_zip *zip) {
    zip->entries = malloc((r->count ? r->count : 1) * sizeof *zip->entries);
    if (!zip->entries) return gn_fail(r->err, GN_ENOMEM, "%s: out of memory", r->path);
    uint64_t at = r->offset;
    for (; zip->count < r->count; zip->count++) {
        const gn_status status = read_entry(r, &at, &zip->entries[zip->count]);
        if (status) return status;
    }
    if (at != r->offset + r->size)
        return damaged(r, "its directory holds more than its number of entries");
    return check_apart(r, zip);
}

gn_status gn_zip_open(gn_zip *zip, const unsigned char *data, size_t bytes, const char *path,
                      gn_error *err) {
    *zip = (gn_zip){0};
    reader r = {.data = data, .bytes = bytes, .path = path, .err = err};
    gn_status status = read_end(&r);
    if (status == GN_OK) status = read_directory(&r, zip);
    if (status) gn_zip_close(zip);
    return status;
}

void gn_zip_close(gn_zip *zip) {
    free(zip->entries);
    *zip = (gn_zip){0};
}

const gn_zip_entry *gn_zip_find(const gn_zip *zip, const char *name, size_t name_len) {
    size_t low = 0, high = zip->count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        const gn_zip_entry *entry = &zip->entries[middle];
        const int order = compare_names(name, name_len, entry->name, entry->name_len);
        if (order == 0) return entry;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}
