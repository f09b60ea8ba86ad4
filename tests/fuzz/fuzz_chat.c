/* fuzz_chat.c - a template file, and after a zero byte the text of a message: any template is
 * refused with a reason or encodes, and the message adds no control id. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define TINY GN_SOURCE_DIR "/tests/golden/data/tiny-bf16"
enum { LAST_CONTROL_ID = 2 };

static gn_tokenizer *tokenizer;
static char path[64];

static void clean_up(void) {
    gn_tokenizer_close(tokenizer);
    unlink(path);
}

static void set_up(void) {
    if (tokenizer) return;
    snprintf(path, sizeof path, "%s/fuzz-chat-XXXXXX", P_tmpdir);
    const int fd = mkstemp(path);
    if (fd < 0 || close(fd) || atexit(clean_up)) abort();
    if (gn_tokenizer_open(&tokenizer, TINY, 512, NULL)) abort();
}

static int count_control(const gn_chat_template *c, const char *text) {
    const gn_message m[] = {{"system", text}, {"user", text}, {"assistant", text}, {"user", text}};
    int32_t *ids, n;
    int control = 0;
    if (gn_chat_template_encode(c, tokenizer, m, 4, &ids, &n, NULL)) abort();
    for (int32_t i = 0; i < n; i++) control += ids[i] <= LAST_CONTROL_ID;
    free(ids);
    return control;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    set_up();
    const uint8_t *end = memchr(data, 0, size);
    const size_t n = end ? (size_t)(end - data) : size;
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) abort();
    gn_chat_template *c;
    gn_error err = {0};
    const gn_status status = gn_chat_template_open(&c, path, P_tmpdir, &err);
    if (status != err.status || (status == GN_OK) != (c != NULL)) abort();
    if (!c) return 0;
    char *text = end ? strndup((const char *)end + 1, size - n - 1) : strdup("</s>");
    if (!text || count_control(c, text) != count_control(c, *text ? "x" : "")) abort();
    free(text);
    gn_chat_template_close(c);
    return 0;
}
