/* tokenizer.cc - SentencePiece behind the C interface of tokenizer.h.
 *
 * The library's public header does not say which pieces are user-defined, and it encodes those
 * wherever they occur in a text, so that anybody could forge a chat marker such as <|im_end|>
 * which a model declares that way. The model file is therefore walked here first (it is a
 * protobuf: ModelProto.pieces = 1; SentencePiece.piece = 1, .type = 3) to learn every piece's
 * type, and user-defined markers are handed to SentencePiece as control pieces, which it never
 * finds in a text. */
#include "engine/tokenizer.h"

#include <sentencepiece_processor.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

struct gn_tokenizer {
    sentencepiece::SentencePieceProcessor processor;
    std::string bytes;          /* of all pieces, one after another */
    std::vector<size_t> starts; /* of each piece in bytes, and the end */
    std::unordered_map<std::string, int32_t> special;
    int32_t bos, eos; /* SentencePiece looks them up by name */
};

namespace {

const size_t max_file = size_t{256} << 20;
const size_t max_text = size_t{256} << 20; /* SentencePiece counts in int */

enum piece_type { PIECE_NORMAL = 1, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER_DEFINED };

struct piece {
    std::string_view text;
    int type;
};

/* Turns whatever the standard library or SentencePiece throws into a status. */
template <typename F> gn_status guarded(gn_error *err, F body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return gn_fail(err, GN_ENOMEM, "out of memory");
    } catch (const std::exception &e) {
        return gn_fail(err, GN_EFORMAT, "SentencePiece: %s", e.what());
    } catch (...) {
        return gn_fail(err, GN_EFORMAT, "SentencePiece: unknown exception");
    }
}

gn_status read_file(const std::string &path, std::string *data, gn_error *err) {
    std::unique_ptr<FILE, int (*)(FILE *)> file(fopen(path.c_str(), "rb"), fclose);
    if (!file)
        return gn_fail(err, errno == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", path.c_str(),
                       strerror(errno));
    char chunk[1 << 16];
    size_t n;
    while ((n = fread(chunk, 1, sizeof chunk, file.get())) > 0) {
        if (data->size() + n > max_file)
            return gn_fail(err, GN_ETOOBIG, "%s: larger than %zu bytes", path.c_str(), max_file);
        data->append(chunk, n);
    }
    if (ferror(file.get())) return gn_fail(err, GN_EIO, "%s: %s", path.c_str(), strerror(errno));
    return GN_OK;
}

/* One field of a protobuf message: `number`, and the value of a varint or the position and length
 * of a string. */
struct field {
    uint64_t number, value;
    size_t at, len;
};

bool read_varint(const std::string &data, size_t *at, size_t end, uint64_t *value) {
    *value = 0;
    for (int shift = 0; shift < 64 && *at < end; shift += 7) {
        const unsigned char c = (unsigned char)data[(*at)++];
        *value |= (uint64_t)(c & 0x7f) << shift;
        if (c < 0x80) return true;
    }
    return false;
}

bool read_field(const std::string &data, size_t *at, size_t end, field *f) {
    uint64_t key;
    if (!read_varint(data, at, end, &key)) return false;
    f->number = key >> 3;
    f->value = 0;
    f->at = *at;
    f->len = 0;
    uint64_t len = 0;
    switch (key & 7) {
    case 0: return read_varint(data, at, end, &f->value);
    case 1: len = 8; break;
    case 2:
        if (!read_varint(data, at, end, &len)) return false;
        f->at = *at;
        break;
    case 5: len = 4; break;
    default: return false;
    }
    if (len > end - *at) return false;
    f->len = (size_t)len;
    *at += f->len;
    return true;
}

bool is_marker(std::string_view s) {
    return s.size() > 2 &&
           ((s.front() == '<' && s.back() == '>') || (s.front() == '[' && s.back() == ']'));
}

/* Reads one piece; a user-defined marker's type is overwritten in place with CONTROL (both are
 * varints of one byte). */
bool read_piece(std::string *data, size_t at, size_t end, piece *p) {
    size_t type_at = 0;
    field f;
    *p = {{}, PIECE_NORMAL};
    while (at < end) {
        if (!read_field(*data, &at, end, &f)) return false;
        if (f.number == 1) p->text = std::string_view(*data).substr(f.at, f.len);
        if (f.number != 3) continue;
        if (f.value > 6 || at != f.at + 1) return false;
        p->type = (int)f.value;
        type_at = f.at;
    }
    if (p->type == PIECE_USER_DEFINED && is_marker(p->text)) (*data)[type_at] = PIECE_CONTROL;
    return true;
}

/* The pieces' texts are views of `data`. */
bool read_pieces(std::string *data, std::vector<piece> *pieces) {
    field f;
    for (size_t at = 0; at < data->size();) {
        if (!read_field(*data, &at, data->size(), &f)) return false;
        if (f.number != 1) continue;
        piece p;
        if (!read_piece(data, f.at, f.at + f.len, &p)) return false;
        pieces->push_back(p);
    }
    return true;
}

void append_bytes(std::string *bytes, std::string_view text) {
    static const std::string_view space = "\xe2\x96\x81"; /* U+2581 */
    for (size_t at; (at = text.find(space)) != text.npos; text.remove_prefix(at + space.size())) {
        bytes->append(text.substr(0, at));
        bytes->push_back(' ');
    }
    bytes->append(text);
}

gn_status make_tables(gn_tokenizer *t, const std::vector<piece> &pieces, const char *path,
                      gn_error *err) {
    for (size_t id = 0; id < pieces.size(); id++) {
        const piece &p = pieces[id];
        t->starts.push_back(t->bytes.size());
        if (p.type == PIECE_CONTROL || p.type == PIECE_USER_DEFINED)
            t->special.emplace(std::string(p.text), (int32_t)id);
        if (t->processor.IsByte((int)id)) {
            unsigned byte;
            const std::string text(p.text);
            if (text.size() != 6 || sscanf(text.c_str(), "<0x%2x>", &byte) != 1)
                return gn_fail(err, GN_EFORMAT, "%s: piece %zu is a byte, but is not <0xNN>", path,
                               id);
            t->bytes.push_back((char)byte);
        } else if (p.type != PIECE_CONTROL && p.type != PIECE_UNKNOWN) {
            append_bytes(&t->bytes, p.text);
        }
    }
    t->starts.push_back(t->bytes.size());
    return GN_OK;
}

gn_status load(gn_tokenizer *t, const std::string &path, int vocab, gn_error *err) {
    std::string data;
    std::vector<piece> pieces;
    const gn_status status = read_file(path, &data, err);
    if (status) return status;
    if (!read_pieces(&data, &pieces) || pieces.empty())
        return gn_fail(err, GN_EFORMAT, "%s: not a SentencePiece model, or cut short",
                       path.c_str());
    if (pieces.size() > (size_t)(vocab > 0 ? vocab : 0))
        return gn_fail(err, GN_EMISMATCH,
                       "%s: has %zu pieces, but the model's vocabulary is %d; the tokenizer is "
                       "another model's",
                       path.c_str(), pieces.size(), vocab);
    const auto loaded = t->processor.LoadFromSerializedProto(data);
    if (!loaded.ok())
        return gn_fail(err, GN_EFORMAT, "%s: %s", path.c_str(), loaded.error_message());
    if (t->processor.GetPieceSize() != (int)pieces.size())
        return gn_fail(err, GN_EFORMAT, "%s: malformed list of pieces", path.c_str());
    t->bos = t->processor.bos_id();
    t->eos = t->processor.eos_id();
    return make_tables(t, pieces, path.c_str(), err);
}

} // namespace

gn_status gn_tokenizer_open(gn_tokenizer **out, const char *dir, int vocab, gn_error *err) {
    *out = nullptr;
    return guarded(err, [&] {
        auto t = std::make_unique<gn_tokenizer>();
        const gn_status status = load(t.get(), std::string(dir) + "/tokenizer.model", vocab, err);
        if (!status) *out = t.release();
        return status;
    });
}

void gn_tokenizer_close(gn_tokenizer *t) {
    delete t;
}

int gn_tokenizer_size(const gn_tokenizer *t) {
    return (int)t->starts.size() - 1;
}

int32_t gn_tokenizer_bos(const gn_tokenizer *t) {
    return t->bos;
}

int32_t gn_tokenizer_eos(const gn_tokenizer *t) {
    return t->eos;
}

int32_t gn_tokenizer_special(const gn_tokenizer *t, const char *piece, size_t len) {
    int32_t id = -1;
    const gn_status status = guarded(nullptr, [&] {
        const auto found = t->special.find(std::string(piece, len));
        if (found != t->special.end()) id = found->second;
        return GN_OK;
    });
    return status ? -1 : id;
}

gn_status gn_tokenizer_encode(const gn_tokenizer *t, const char *text, size_t len, int32_t **ids,
                              int32_t *n, gn_error *err) {
    *ids = nullptr;
    *n = 0;
    if (len > max_text)
        return gn_fail(err, GN_ETOOBIG, "text of %zu bytes; at most %zu can be tokenized at once",
                       len, max_text);
    return guarded(err, [&] {
        std::vector<int> encoded;
        const auto done = t->processor.Encode(std::string_view(text, len), &encoded);
        if (!done.ok()) return gn_fail(err, GN_EFORMAT, "SentencePiece: %s", done.error_message());
        *ids = (int32_t *)malloc((encoded.size() + 1) * sizeof **ids); /* never of zero bytes */
        if (!*ids) return gn_fail(err, GN_ENOMEM, "out of memory");
        if (!encoded.empty()) memcpy(*ids, encoded.data(), encoded.size() * sizeof **ids);
        *n = (int32_t)encoded.size();
        return GN_OK;
    });
}

gn_status gn_tokenizer_encode_places(const gn_tokenizer *t, const char *text, size_t len,
                                     int32_t **ids, int32_t **begins, int32_t *n, gn_error *err) {
    *ids = *begins = nullptr;
    *n = 0;
    if (len > max_text)
        return gn_fail(err, GN_ETOOBIG, "text of %zu bytes; at most %zu can be tokenized at once",
                       len, max_text);
    return guarded(err, [&] {
        sentencepiece::ImmutableSentencePieceText pieces;
        const auto done = t->processor.Encode(std::string_view(text, len), pieces.mutable_proto());
        if (!done.ok()) return gn_fail(err, GN_EFORMAT, "SentencePiece: %s", done.error_message());
        const size_t bytes = (pieces.pieces_size() + 1) * sizeof **ids; /* never of zero bytes */
        *ids = (int32_t *)malloc(bytes);
        *begins = (int32_t *)malloc(bytes);
        if (!*ids || !*begins) {
            free(*ids);
            free(*begins);
            *ids = *begins = nullptr;
            return gn_fail(err, GN_ENOMEM, "out of memory");
        }
        for (const auto &piece : pieces.pieces()) {
            (*ids)[*n] = (int32_t)piece.id();
            (*begins)[(*n)++] = (int32_t)piece.begin();
        }
        return GN_OK;
    });
}

const char *gn_tokenizer_bytes(const gn_tokenizer *t, int32_t id, size_t *len) {
    *len = 0;
    if (id < 0 || id >= gn_tokenizer_size(t)) return "";
    *len = t->starts[(size_t)id + 1] - t->starts[(size_t)id];
    return t->bytes.data() + t->starts[(size_t)id];
}
