/* bytes.h - reading little-endian numbers from files: unaligned, and never past an end. */
#ifndef GN_BYTES_H
#define GN_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline uint16_t gn_le16(const unsigned char *p) {
    return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t gn_le32(const unsigned char *p) {
    return gn_le16(p) | (uint32_t)gn_le16(p + 2) << 16;
}

static inline uint64_t gn_le64(const unsigned char *p) {
    return gn_le32(p) | (uint64_t)gn_le32(p + 4) << 32;
}

/* Does [offset, offset + length) lie within [0, total)? Safe against overflow. */
static inline bool gn_within(uint64_t offset, uint64_t length, uint64_t total) {
    return offset <= total && length <= total - offset;
}

#endif
