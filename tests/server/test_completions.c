/* test_completions.c - both completion families: answers, streams, refusals. */
#include "tests/server/harness.c"

#define HI "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"

/* ---- chat ---- */

Test(completions, chat) {
    harness h;
    start_server(&h, NULL);
    char *answer =
        post(&h, "/v1/chat/completions",
             "{\"model\":\"fake\",\"messages\":[{\"role\":\"developer\",\"content\":\"x\"},"
             "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"h\xc3\xa4\"},"
             "{\"type\":\"text\",\"text\":\"\\\"b\"}]}],\"user\":\"me\",\"seed\":null}");
    cJSON *json = json_of(answer);
    cr_assert_eq(status_of(answer), 200);
    cr_assert_eq(strncmp(text_at(json, "id"), "chatcmpl-", 9), 0);
    cr_assert_str_eq(text_at(json, "object"), "chat.completion");
    cr_assert_str_eq(text_at(json, "model"), "fake");
    cr_assert_str_eq(text_at(json, "choices.0.message.role"), "assistant");
    cr_assert_str_eq(text_at(json, "choices.0.message.content"), "h\xc3\xa4\n\"b");
    cr_assert(cJSON_IsNull(at(json, "choices.0.message.refusal")));
    cr_assert(cJSON_IsNull(at(json, "choices.0.logprobs")));
    cr_assert_str_eq(text_at(json, "choices.0.finish_reason"), "stop");
    cr_assert_eq(number_at(json, "usage.prompt_tokens"), 7);
    cr_assert_eq(number_at(json, "usage.completion_tokens"), 7);
    cr_assert_eq(number_at(json, "usage.total_tokens"), 14);
    cr_assert_eq(number_at(json, "usage.prompt_tokens_details.cached_tokens"), 1);
    cJSON_Delete(json);
    free(answer);
    stop_server(&h);
}

/* Which adapters answer: the fake model says so. */
Test(completions, adapters) {
    static const struct {
        const char *fields, *model, *content;
    } cases[] = {
        {"", "fake", "hi"},
        {"\"model\":null,", "fake", "hi"},
        {"\"model\":\"pirate\",", "pirate", "[pirate 1]hi"},
        {"\"model\":\"fake\",\"adapters\":[{\"name\":\"brief\",\"scale\":-0.5}],", "fake",
         "[brief -0.5]hi"},
        {"\"adapters\":[{\"name\":\"brief\",\"scale\":0.25},{\"name\":\"pirate\"}],", "fake",
         "[brief 0.25][pirate 1]hi"},
        {"\"model\":\"pirate\",\"adapters\":[],", "pirate", "[pirate 1]hi"},
    };
    harness h;
    start_server(&h, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char body[512];
        snprintf(body, sizeof body, "{%s" HI "}", cases[i].fields);
        char *answer = post(&h, "/v1/chat/completions", body);
        cJSON *json = json_of(answer);
        cr_assert_str_eq(text_at(json, "choices.0.message.content"), cases[i].content, "%s", body);
        cr_assert_str_eq(text_at(json, "model"), cases[i].model);
        cJSON_Delete(json);
        free(answer);
    }
    stop_server(&h);
}

/* The events of a stream as JSON, ended by [DONE]; how many. */
static int events_of(char *answer, cJSON **events, int max) {
    int n = 0;
    cr_assert_eq(status_of(answer), 200, "%s", answer);
    cr_assert(strstr(answer, "Content-Type: text/event-stream"));
    for (char *event = strstr(unchunk(answer), "data: "); event; event = strstr(event, "data: ")) {
        event += 6;
        char *end = strstr(event, "\n\n");
        cr_assert(end, "an event has no end: %s", event);
        *end = 0;
        if (strcmp(event, "[DONE]") == 0) {
            cr_assert_str_eq(end + 2, "", "something follows [DONE]");
            return n;
        }
        cr_assert_lt(n, max);
        events[n] = cJSON_Parse(event);
        cr_assert(events[n++], "no JSON: %s", event);
        event = end + 1;
    }
    cr_assert(false, "no [DONE]");
    return n;
}

static void delete_all(cJSON **events, int n) {
    for (int i = 0; i < n; i++) cJSON_Delete(events[i]);
}

Test(completions, chat_stream) {
    cJSON *e[64];
    harness h;
    start_server(&h, NULL);
    char *answer =
        post(&h, "/v1/chat/completions",
             "{\"messages\":[{\"role\":\"user\",\"content\":\"h\xc3\xa4!\"}],\"stream\":true}");
    const int n = events_of(answer, e, 64);
    cr_assert_eq(n, 5); /* role, three characters, finish */
    for (int i = 0; i < n; i++) {
        cr_assert_str_eq(text_at(e[i], "id"), text_at(e[0], "id"));
        cr_assert_str_eq(text_at(e[i], "object"), "chat.completion.chunk");
        cr_assert_null(at(e[i], "usage"));
        if (i < n - 1) cr_assert(cJSON_IsNull(at(e[i], "choices.0.finish_reason")));
    }
    cr_assert_str_eq(text_at(e[0], "choices.0.delta.role"), "assistant");
    cr_assert_str_eq(text_at(e[0], "choices.0.delta.content"), "");
    cr_assert_str_eq(text_at(e[1], "choices.0.delta.content"), "h");
    cr_assert_str_eq(text_at(e[2], "choices.0.delta.content"), "\xc3\xa4");
    cr_assert_str_eq(text_at(e[3], "choices.0.delta.content"), "!");
    cr_assert_str_eq(text_at(e[4], "choices.0.finish_reason"), "stop");
    cr_assert_null(at(e[4], "choices.0.delta.content"));
    delete_all(e, n);
    free(answer);

    answer = post(&h, "/v1/chat/completions",
                  "{" HI ",\"stream\":true,\"max_tokens\":1,\"n\":2,"
                  "\"stream_options\":{\"include_usage\":true}}");
    const int m = events_of(answer, e, 64);
    cr_assert_eq(m, 7); /* two choices of three events, usage */
    int finished[2] = {0, 0};
    for (int i = 0; i < m - 1; i++) {
        cr_assert(cJSON_IsNull(at(e[i], "usage")));
        if (cJSON_IsNull(at(e[i], "choices.0.finish_reason"))) continue;
        cr_assert_str_eq(text_at(e[i], "choices.0.finish_reason"), "length");
        finished[(int)number_at(e[i], "choices.0.index")]++;
    }
    cr_assert_eq(finished[0], 1);
    cr_assert_eq(finished[1], 1);
    cr_assert_eq(cJSON_GetArraySize(at(e[m - 1], "choices")), 0);
    cr_assert_eq(number_at(e[m - 1], "usage.prompt_tokens"), 3);
    cr_assert_eq(number_at(e[m - 1], "usage.completion_tokens"), 2);
    delete_all(e, m);
    free(answer);
    stop_server(&h);
}

/* HTTP/1.0 has no chunks: the stream ends with the connection. */
Test(completions, stream_for_http10) {
    harness h;
    start_server(&h, NULL);
    char request[256];
    static const char body[] = "{" HI ",\"stream\":true}";
    snprintf(request, sizeof request,
             "POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %zu\r\n\r\n%s", sizeof body - 1,
             body);
    char *answer = ask(&h, request);
    cr_assert_eq(status_of(answer), 200, "%s", answer);
    cr_assert_null(strstr(answer, "Transfer-Encoding"));
    cr_assert_eq(strncmp(body_of(answer), "data: {", 7), 0);
    cr_assert(strstr(answer, "data: [DONE]\n\n"));
    free(answer);
    stop_server(&h);
}

Test(completions, chat_logprobs) {
    harness h;
    start_server(&h, NULL);
    char *answer = post(&h, "/v1/chat/completions",
                        "{\"messages\":[{\"role\":\"user\",\"content\":\"h\xc3\xa4\"}],"
                        "\"logprobs\":true,\"top_logprobs\":2}");
    cJSON *json = json_of(answer);
    const cJSON *content = at(json, "choices.0.logprobs.content");
    cr_assert_eq(cJSON_GetArraySize(content), 3); /* bytes; the end of the reply is not listed */
    cr_assert_str_eq(text_at(content, "0.token"), "h");
    cr_assert_eq(number_at(content, "0.logprob"), -0.25);
    cr_assert_eq(number_at(content, "0.bytes.0"), 'h');
    cr_assert_str_eq(text_at(content, "1.token"), "\\xc3");
    cr_assert_eq(number_at(content, "1.bytes.0"), 0xc3);
    cr_assert_eq(cJSON_GetArraySize(at(content, "2.top_logprobs")), 2);
    cr_assert_str_eq(text_at(content, "2.top_logprobs.1.token"), "b");
    cr_assert_eq(number_at(content, "2.top_logprobs.1.logprob"), -2);
    cJSON_Delete(json);
    free(answer);
    stop_server(&h);
}

/* ---- legacy ---- */

Test(completions, prompts_of_every_form) {
    static const struct {
        const char *prompt;
        int n;
        const char *texts[2];
    } cases[] = {
        {"\"ab\"", 1, {"ab"}},
        {"[\"ab\",\"c\"]", 2, {"ab", "c"}},
        {"[97,98]", 1, {"ab"}},
        {"[[256,97],[98]]", 2, {"a", "b"}},
    };
    harness h;
    start_server(&h, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char body[256];
        snprintf(body, sizeof body, "{\"prompt\":%s}", cases[i].prompt);
        char *answer = post(&h, "/v1/completions", body);
        cJSON *json = json_of(answer);
        cr_assert_eq(cJSON_GetArraySize(at(json, "choices")), cases[i].n, "%s", body);
        for (int c = 0; c < cases[i].n; c++) {
            const cJSON *choice = cJSON_GetArrayItem(at(json, "choices"), c);
            cr_assert_str_eq(text_at(choice, "text"), cases[i].texts[c], "%s", body);
            cr_assert_eq(number_at(choice, "index"), c);
        }
        cr_assert_str_eq(text_at(json, "object"), "text_completion");
        cJSON_Delete(json);
        free(answer);
    }
    stop_server(&h);
}

/* What evaluation harnesses ask for. */
Test(completions, echo_with_logprobs) {
    harness h;
    start_server(&h, NULL);
    char *answer =
        post(&h, "/v1/completions",
             "{\"prompt\":[256,104,195,164,98],\"echo\":true,\"logprobs\":2,\"max_tokens\":0,"
             "\"temperature\":0}");
    cJSON *json = json_of(answer);
    const cJSON *l = at(json, "choices.0.logprobs");
    cr_assert_str_eq(text_at(json, "choices.0.text"), "h\xc3\xa4"
                                                      "b");
    cr_assert_str_eq(text_at(json, "choices.0.finish_reason"), "length");
    cr_assert_eq(cJSON_GetArraySize(at(l, "tokens")), 5);
    cr_assert_str_eq(text_at(l, "tokens.0"), "");
    cr_assert_str_eq(text_at(l, "tokens.2"), "bytes:\\xc3");
    cr_assert(cJSON_IsNull(at(l, "token_logprobs.0")));
    cr_assert(cJSON_IsNull(at(l, "top_logprobs.0")));
    cr_assert_eq(number_at(l, "token_logprobs.4"), -0.5);
    /* "b" is among its alternatives already; "h" is not, and is added. */
    cr_assert_eq(cJSON_GetArraySize(at(l, "top_logprobs.4")), 2);
    cr_assert_eq(cJSON_GetArraySize(at(l, "top_logprobs.1")), 3);
    cr_assert_eq(number_at(l, "top_logprobs.1.h"), -0.5);
    static const int offsets[] = {0, 0, 1, 2, 2};
    for (int i = 0; i < 5; i++)
        cr_assert_eq(cJSON_GetArrayItem(at(l, "text_offset"), i)->valueint, offsets[i], "%d", i);
    cr_assert_eq(number_at(json, "usage.completion_tokens"), 0);
    cJSON_Delete(json);
    free(answer);

    cJSON *e[16];
    answer =
        post(&h, "/v1/completions",
             "{\"prompt\":\"ab\",\"echo\":true,\"logprobs\":0,\"max_tokens\":1,\"stream\":true}");
    const int n = events_of(answer, e, 16);
    cr_assert_eq(n, 3);
    cr_assert_str_eq(text_at(e[0], "choices.0.text"), "ab");
    cr_assert_eq(cJSON_GetArraySize(at(e[0], "choices.0.logprobs.tokens")), 3);
    cr_assert_str_eq(text_at(e[1], "choices.0.text"), "a");
    cr_assert_eq(cJSON_GetArraySize(at(e[1], "choices.0.logprobs.tokens")), 1);
    cr_assert_eq(number_at(e[1], "choices.0.logprobs.text_offset.0"), 2);
    cr_assert_str_eq(text_at(e[2], "choices.0.finish_reason"), "length");
    delete_all(e, n);
    free(answer);
    stop_server(&h);
}

/* A text long enough to be tokenized on a worker, and one too long for any context. */
Test(completions, long_prompts) {
    harness h;
    start_server(&h, NULL);
    char *body = malloc(4 << 20);
    int n = sprintf(body, "{\"max_tokens\":1,\"prompt\":\"");
    memset(body + n, 'a', 20000);
    strcpy(body + n + 20000, "\"}");
    char *answer = post(&h, "/v1/completions", body);
    cr_assert_eq(status_of(answer), 400, "%s", answer); /* 20001 tokens, context of 8192 */
    cr_assert(strstr(answer, "context_length_exceeded"));
    free(answer);
    answer = post(&h, "/tokenize", body + 0);
    cr_assert_eq(status_of(answer), 400); /* max_tokens is no parameter of /tokenize */
    free(answer);
    n = sprintf(body, "{\"prompt\":\"");
    memset(body + n, 'a', 20000);
    strcpy(body + n + 20000, "\"}");
    answer = post(&h, "/tokenize", body);
    cr_assert_eq(status_of(answer), 200);
    cr_assert(strstr(answer, "\"count\":20001"));
    free(answer);
    memset(body + n, 'a', 3 << 20);
    strcpy(body + n + (3 << 20), "\"}");
    answer = post(&h, "/v1/completions", body);
    cr_assert_eq(status_of(answer), 400);
    cr_assert(strstr(answer, "longer than the context of 8192 tokens"), "%s", answer);
    free(answer);
    free(body);
    stop_server(&h);
}

/* ---- refusals ---- */

typedef struct refusal {
    const char *body;
    int status;
    const char *param, *code, *says; /* NULL: none, or anything */
} refusal;

static void check_refusals(const char *path, const refusal *cases, size_t n) {
    harness h;
    start_server(&h, NULL);
    for (size_t i = 0; i < n; i++) {
        const refusal *c = &cases[i];
        char *answer = post(&h, path, c->body);
        cr_assert_eq(status_of(answer), c->status, "%s\nwas answered with\n%s", c->body, answer);
        cJSON *json = json_of(answer);
        cr_assert_eq(cJSON_GetArraySize(at(json, "error")), 4);
        cr_assert_str_eq(text_at(json, "error.type"),
                         c->status == 404 ? "not_found_error" : "invalid_request_error");
        cr_assert_str_eq(text_at(json, "error.param"), c->param ? c->param : "(none)", "%s",
                         c->body);
        cr_assert_str_eq(text_at(json, "error.code"), c->code ? c->code : "(none)", "%s", c->body);
        if (c->says)
            cr_assert(strstr(text_at(json, "error.message"), c->says), "%s\nlacks %s", answer,
                      c->says);
        cJSON_Delete(json);
        free(answer);
    }
    stop_server(&h);
}

Test(completions, chat_refusals) {
    static const refusal cases[] = {
        {"", 400, NULL, "invalid_json", "needs a body"},
        {"[]", 400, NULL, NULL, "must be a JSON object"},
        {"{\"a\":1,}", 400, NULL, "invalid_json", "line 1, column"},
        {"{\n\"a\": tru}", 400, NULL, "invalid_json", "line 2, column"},
        {"{} x", 400, NULL, "invalid_json", NULL},
        {"{\"a\":\"\xff\"}", 400, NULL, "invalid_json", "not UTF-8 at byte 6"},
        {"{\"a\":\"x\\u0000y\"}", 400, NULL, "invalid_json", "zero character"},
        {"{\"a\":\"\\ud800\"}", 400, NULL, "invalid_json", NULL},
        {"{" HI ",\"temprature\":1}", 400, "temprature", "unknown_parameter", "\"temperature\"?"},
        {"{}", 400, "messages", NULL, NULL},
        {"{\"messages\":[]}", 400, "messages", NULL, NULL},
        {"{\"messages\":[1]}", 400, "messages[0]", NULL, NULL},
        {"{\"messages\":[{\"role\":\"tool\",\"content\":\"\"}]}", 400, "messages[0].role", NULL,
         NULL},
        {"{\"messages\":[{\"role\":\"user\"}]}", 400, "messages[0].content", NULL, NULL},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", 400,
         "messages[0].content", NULL, "text only"},
        {"{" HI ",\"model\":\"gpt-4\"}", 404, "model", "model_not_found", "fake, pirate, brief"},
        {"{" HI ",\"model\":1}", 400, "model", NULL, NULL},
        {"{" HI ",\"adapters\":[{\"name\":\"x\"}]}", 404, "adapters", "model_not_found", NULL},
        {"{" HI ",\"adapters\":[{\"scale\":1}]}", 400, "adapters", NULL, NULL},
        {"{" HI ",\"adapters\":[{\"name\":\"brief\",\"scale\":1e99}]}", 400, "scale", NULL, NULL},
        {"{" HI ",\"adapters\":{}}", 400, "adapters", NULL, NULL},
        {"{" HI ",\"model\":\"pirate\",\"adapters\":[{\"name\":\"brief\"}]}", 400, "adapters", NULL,
         "must be the base"},
        {"{" HI ",\"temperature\":2.1}", 400, "temperature", NULL, "from 0 to 2"},
        {"{" HI ",\"temperature\":\"1\"}", 400, "temperature", NULL, NULL},
        {"{" HI ",\"temperature\":1e999}", 400, "temperature", NULL, NULL},
        {"{" HI ",\"max_tokens\":0}", 400, "max_tokens", NULL, NULL},
        {"{" HI ",\"max_completion_tokens\":1.5}", 400, "max_completion_tokens", NULL, NULL},
        {"{" HI ",\"max_tokens\":9000}", 400, NULL, "context_length_exceeded", NULL},
        {"{" HI ",\"n\":17}", 400, "n", NULL, NULL},
        {"{" HI ",\"stop\":[\"\"]}", 400, "stop", NULL, NULL},
        {"{" HI ",\"stop\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}", 400, "stop", NULL,
         "up to 16"},
        {"{" HI ",\"stop_token_ids\":[258]}", 400, "stop_token_ids", NULL, NULL},
        {"{" HI ",\"logit_bias\":{\"300\":1}}", 400, "logit_bias", NULL, NULL},
        {"{" HI ",\"logit_bias\":{\"3\":101}}", 400, "logit_bias", NULL, NULL},
        {"{" HI ",\"logit_bias\":[1]}", 400, "logit_bias", NULL, NULL},
        {"{" HI ",\"top_logprobs\":2}", 400, "top_logprobs", NULL, NULL},
        {"{" HI ",\"logprobs\":true,\"top_logprobs\":21}", 400, "top_logprobs", NULL, NULL},
        {"{" HI ",\"stream_options\":{\"include_usage\":true}}", 400, "stream_options", NULL, NULL},
        {"{" HI ",\"tools\":[{\"type\":\"function\"}]}", 400, "tools", "unsupported_parameter",
         NULL},
        {"{" HI ",\"tool_choice\":\"auto\"}", 400, "tool_choice", "unsupported_parameter", NULL},
        {"{" HI ",\"response_format\":{\"type\":\"json_object\"}}", 400, "response_format",
         "unsupported_parameter", NULL},
        {"{" HI ",\"modalities\":[\"text\",\"audio\"]}", 400, "modalities", "unsupported_parameter",
         NULL},
        {"{" HI ",\"seed\":1.5}", 400, "seed", NULL, NULL},
    };
    check_refusals("/v1/chat/completions", cases, sizeof cases / sizeof *cases);
}

Test(completions, harmless_fields_are_accepted) {
    harness h;
    start_server(&h, NULL);
    char *answer = post(
        &h, "/v1/chat/completions",
        "{" HI ",\"user\":\"u\",\"metadata\":{},\"store\":false,\"tools\":[],\"tool_choice\":"
        "\"none\",\"response_format\":{\"type\":\"text\"},\"modalities\":[\"text\"],\"stop\":null,"
        "\"audio\":null,\"top_k\":-1,\"logit_bias\":{\"7\":-100},\"seed\":-9007199254740992,"
        "\"stop_token_ids\":[],\"parallel_tool_calls\":true,\"n\":1,\"logprobs\":false}");
    cr_assert_eq(status_of(answer), 200, "%s", answer);
    free(answer);
    stop_server(&h);
}

Test(completions, text_refusals) {
    static const refusal cases[] = {
        {"{}", 400, "prompt", NULL, NULL},
        {"{\"prompt\":[]}", 400, "prompt", NULL, NULL},
        {"{\"prompt\":[[]]}", 400, "prompt", NULL, NULL},
        {"{\"prompt\":{}}", 400, "prompt", NULL, NULL},
        {"{\"prompt\":[1,-1]}", 400, "prompt", NULL, "prompt[1]"},
        {"{\"prompt\":[1,258]}", 400, "prompt", NULL, "from 0 to 257"},
        {"{\"prompt\":[1.5]}", 400, "prompt", NULL, NULL},
        {"{\"prompt\":[\"a\",1]}", 400, "prompt", NULL, NULL},
        {"{\"prompt\":\"a\",\"max_tokens\":0}", 400, "max_tokens", NULL, NULL},
        {"{\"prompt\":\"a\",\"logprobs\":21}", 400, "logprobs", NULL, NULL},
        {"{\"prompt\":\"a\",\"logprobs\":true}", 400, "logprobs", NULL, NULL},
        {"{\"prompt\":\"a\",\"best_of\":2}", 400, "best_of", "unsupported_parameter", NULL},
        {"{\"prompt\":\"a\",\"suffix\":\"b\"}", 400, "suffix", "unsupported_parameter", NULL},
        {"{\"prompt\":\"a\",\"messages\":[]}", 400, "messages", "unknown_parameter", NULL},
    };
    check_refusals("/v1/completions", cases, sizeof cases / sizeof *cases);
}

/* Repeated keys would be held as often as they are written. */
Test(completions, more_biases_than_tokens) {
    char body[8192] = "{\"prompt\":\"a\",\"logit_bias\":{\"1\":0";
    harness h;
    for (int i = 0; i < FAKE_VOCAB; i++) strcat(body, ",\"1\":0");
    strcat(body, "}}");
    start_server(&h, NULL);
    char *answer = post(&h, "/v1/completions", body);
    cr_assert_eq(status_of(answer), 400, "%s", answer);
    cr_assert(strstr(answer, "259 entries for 258 tokens"), "%s", answer);
    free(answer);
    stop_server(&h);
}
