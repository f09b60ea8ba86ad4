/* test_peft.c - adapter_config.json: what its options mean for a module, and which are refused. */
#include <criterion/criterion.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/json_file.h"
#include "engine/module_pattern.h"
#include "engine/peft.h"

static char dir[64], path[96];

static void make_folder(void) {
    snprintf(dir, sizeof dir, "%s/guanaco-XXXXXX", P_tmpdir);
    cr_assert(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
}

static void remove_folder(void) {
    unlink(path);
    rmdir(dir);
}

TestSuite(peft, .init = make_folder, .fini = remove_folder);

static void write_file(const char *text, size_t n) {
    FILE *f = fopen(path, "wb");
    cr_assert(f);
    cr_assert_eq(fwrite(text, 1, n, f), n);
    cr_assert_eq(fclose(f), 0);
}

static gn_status open_text(gn_peft **peft, const char *text, gn_error *err) {
    write_file(text, strlen(text));
    *err = (gn_error){0};
    return gn_peft_open(peft, dir, err);
}

/* The least a config needs, and more options. */
static gn_status open_with(gn_peft **peft, const char *options, gn_error *err) {
    char text[2048];
    snprintf(text, sizeof text, "{\"peft_type\": \"LORA\", \"r\": 8, \"lora_alpha\": 16%s%s}",
             *options ? ", " : "", options);
    return open_text(peft, text, err);
}

/* ---- module patterns ---- */

Test(peft, patterns_match_as_in_peft) {
    static const struct {
        const char *key, *module;
        bool matches; /* re.match(rf"(.*\.)?({key})$", module) in Python */
    } cases[] = {
        {"q_proj", "model.layers.0.self_attn.q_proj", true},
        {"q_proj", "q_proj", true},
        {"q_proj", "model.layers.0.self_attn.k_proj", false},
        {"proj", "model.layers.0.self_attn.q_proj", false},
        {"self_attn", "model.layers.0.self_attn.q_proj", false},
        {"layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", true},
        {"layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", false},
        {"0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", false},
        {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", true},
        {"base.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", false},
        {"self.attn.q_proj", "model.layers.0.self_attn.q_proj", true}, /* "." is any character */
        {".*q_proj", "model.layers.0.self_attn.q_proj", true},
        {".*\\.layers\\.0\\..*", "model.layers.0.self_attn.q_proj", true},
        {".*\\.layers\\.0\\..*", "model.layers.10.self_attn.q_proj", false},
        {"^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", true},
        {"^layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", false},
        {"^q_proj", "model.layers.0.self_attn.q_proj", false},
        {"q_proj$", "model.layers.0.self_attn.q_proj", true},
        {"q_proj|v_proj", "model.layers.0.self_attn.v_proj", true},
        {"q_proj|v_proj", "model.layers.0.self_attn.k_proj", false},
        {"(q|v)_proj", "model.layers.0.self_attn.v_proj", true},
        {"(?:q|v)_proj", "model.layers.0.self_attn.v_proj", true},
        {"[qv]_proj", "model.layers.0.self_attn.v_proj", true},
        {"[^qv]_proj", "model.layers.0.self_attn.v_proj", false},
        {"[^qv]_proj", "model.layers.0.self_attn.k_proj", true},
        {"layers\\.\\d+\\.mlp\\.up_proj", "model.layers.17.mlp.up_proj", true},
        {"layers\\.[0-9]\\.mlp\\.up_proj", "model.layers.17.mlp.up_proj", false},
        {"layers\\.1?[0-9]\\.mlp\\.up_proj", "model.layers.17.mlp.up_proj", true},
        {"\\w+_proj", "model.layers.17.mlp.up_proj", true},
        {"mlp\\.\\w+", "model.layers.17.mlp.up_proj", true},
        {"layers\\.(1|2|17)\\.mlp.*", "model.layers.17.mlp.up_proj", true},
        {"layers\\.(1|2|7)\\.mlp.*", "model.layers.17.mlp.up_proj", false},
        {"up\\-proj", "model.layers.17.mlp.up_proj", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_module_pattern pattern;
        gn_error err = {0};
        cr_assert_eq(gn_module_pattern_open(&pattern, cases[i].key, "file", &err), GN_OK, "%s: %s",
                     cases[i].key, err.message);
        cr_assert_eq(gn_module_pattern_match(&pattern, cases[i].module), cases[i].matches,
                     "%s and %s", cases[i].key, cases[i].module);
        gn_module_pattern_close(&pattern);
    }
}

Test(peft, patterns_not_understood) {
    static char long_key[300];
    memset(long_key, 'a', sizeof long_key - 1);
    const char *const keys[] = {
        "",          "q_proj{2}",   "(?=q)q_proj", "(?i)q_proj", "(q)\\1", "q_proj\\b", "q.*?_proj",
        "q.*+_proj", "*q",          "(*q)",        "a|*q",       "^*q",    "(q",        "q)",
        "[q",        "[[:alpha:]]", "[\\d]_proj",  "q\\",        "q proj", "\xc3\xa4",  long_key};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        gn_module_pattern pattern;
        gn_error err = {0};
        cr_assert_eq(gn_module_pattern_open(&pattern, keys[i], "file", &err), GN_EUNSUPPORTED,
                     "\"%s\"", keys[i]);
        cr_assert(strstr(err.message, "file: "), "%s", err.message);
        gn_module_pattern_close(&pattern);
    }
}

/* Patterns that keep backtracking matchers, and glibc's regcomp, busy for minutes. */
Test(peft, patterns_cannot_stall, .timeout = 10) {
    static char keys[3][257];
    for (int i = 0; i < 28; i++) strcat(keys[0], "(.*|.+)*");
    for (int i = 0; i < 84; i++) strcat(keys[1], "(");
    strcat(keys[1], "a");
    for (int i = 0; i < 84; i++) strcat(keys[1], ")*");
    for (int i = 0; i < 42; i++) strcat(keys[2], "(\\w*)");
    strcat(keys[2], "-");
    for (int i = 0; i < 3; i++) {
        gn_module_pattern pattern;
        gn_error err = {0};
        cr_assert_eq(gn_module_pattern_open(&pattern, keys[i], "file", &err), GN_OK, "%s",
                     err.message);
        for (int k = 0; k < 1000; k++)
            cr_assert_eq(gn_module_pattern_match(&pattern, "model.layers.0.self_attn.q_proj"),
                         i == 0);
        gn_module_pattern_close(&pattern);
    }
    char options[1024] = "\"rank_pattern\": {\"[a]00\": 1";
    for (int i = 1; i < 33; i++) sprintf(options + strlen(options), ", \"[a]%02d\": 1", i);
    strcat(options, "}");
    gn_peft *peft = NULL;
    gn_error err;
    cr_assert_eq(open_with(&peft, options, &err), GN_ETOOBIG, "%s", err.message);
    cr_assert(strstr(err.message, "rank_pattern"), "%s", err.message);
}

/* ---- ranks and scales ---- */

#define Q0 "model.layers.0.self_attn.q_proj"
#define Q1 "model.layers.1.self_attn.q_proj"
#define UP "model.layers.0.mlp.up_proj"

Test(peft, ranks_and_scales) {
    static const struct {
        const char *options, *module;
        int rank;
        double scale;
    } cases[] = {
        {"", Q0, 8, 2},
        {"\"use_rslora\": true", Q0, 8, 5.656854249492380},
        {"\"use_rslora\": null", Q0, 8, 2},
        {"\"rank_pattern\": {\"q_proj\": 4}", Q0, 4, 4},
        {"\"rank_pattern\": {\"q_proj\": 4}", UP, 8, 2},
        {"\"rank_pattern\": {\"q_proj\": 4}, \"use_rslora\": true", Q0, 4, 8},
        {"\"rank_pattern\": {\"layers.0.self_attn.q_proj\": 4}", Q1, 8, 2},
        {"\"alpha_pattern\": {\"q_proj\": 4}", Q0, 8, 0.5},
        {"\"alpha_pattern\": {\"q_proj\": 0.1}", Q0, 8, 0.0125},
        {"\"alpha_pattern\": {\"q_proj\": 3}, \"rank_pattern\": {\"q_proj\": 2}", Q0, 2, 1.5},
        {"\"rank_pattern\": {\"layers.0.self_attn.q_proj\": 2, \"q_proj\": 4}", Q0, 2, 8},
        {"\"rank_pattern\": {\"q_proj\": 4, \"layers.0.self_attn.q_proj\": 2}", Q0, 4, 4},
        {"\"rank_pattern\": {\"^model\\\\.layers\\\\.1\\\\..*\": 1}", Q1, 1, 16},
        {"\"rank_pattern\": null, \"alpha_pattern\": {}", Q1, 8, 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_peft *peft = NULL;
        gn_error err;
        cr_assert_eq(open_with(&peft, cases[i].options, &err), GN_OK, "%s: %s", cases[i].options,
                     err.message);
        cr_assert_eq(gn_peft_rank(peft, cases[i].module), cases[i].rank, "%s", cases[i].options);
        cr_assert_eq(gn_peft_scale(peft, cases[i].module), (float)cases[i].scale, "%s: %.9g",
                     cases[i].options, gn_peft_scale(peft, cases[i].module));
        gn_peft_close(peft);
    }
}

Test(peft, fractional_alpha) {
    gn_peft *peft = NULL;
    gn_error err;
    cr_assert_eq(open_text(&peft, "{\"r\": 3, \"lora_alpha\": 0.5, \"peft_type\": \"LORA\"}", &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(gn_peft_scale(peft, Q0), (float)(0.5 / 3));
    gn_peft_close(peft);
}

Test(peft, targets) {
    static const struct {
        const char *targets, *module;
        bool covered;
    } cases[] = {
        {"[\"q_proj\", \"v_proj\"]", Q0, true},
        {"[\"q_proj\", \"v_proj\"]", UP, false},
        {"[\"proj\"]", UP, false},
        {"[\"model.layers.0.mlp.up_proj\"]", UP, true},
        {"[\"layers.0.mlp.up_proj\", \"q_proj\"]", UP, true},
        {"\"all-linear\"", UP, true},
        {"\".*q_proj\"", UP, true},
        {"null", UP, true},
        {"[]", UP, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char options[128];
        gn_peft *peft = NULL;
        gn_error err;
        snprintf(options, sizeof options, "\"target_modules\": %s", cases[i].targets);
        cr_assert_eq(open_with(&peft, options, &err), GN_OK, "%s: %s", options, err.message);
        cr_assert_eq(gn_peft_targets(peft, cases[i].module), cases[i].covered, "%s", options);
        gn_peft_close(peft);
    }
}

/* ---- what is refused ---- */

Test(peft, options_that_change_the_arithmetic) {
    static const char *const refused[] = {
        "\"use_dora\": true",
        "\"fan_in_fan_out\": true",
        "\"lora_bias\": true",
        "\"bias\": \"all\"",
        "\"bias\": \"lora_only\"",
        "\"bias\": true",
        "\"modules_to_save\": [\"lm_head\"]",
        "\"use_qalora\": true",
        "\"alora_invocation_tokens\": [1, 2]",
        "\"arrow_config\": {\"top_k\": 2}",
        "\"layer_replication\": [[0, 4], [2, 5]]",
        "\"trainable_token_indices\": [5]",
        "\"target_parameters\": [\"experts.gate_up_proj\"]",
        "\"use_bdlora\": {\"nblocks\": 2}",
        "\"kasa_config\": {\"beta\": 0.1}",
        "\"an_option_of_tomorrow\": 1",
        "\"another_one\": \"x\"",
        "\"init_lora_weights\": \"pissa\"",
        "\"init_lora_weights\": \"pissa_niter_16\"",
        "\"init_lora_weights\": \"olora\"",
        "\"init_lora_weights\": \"corda\"",
        "\"init_lora_weights\": \"loftq\"",
        "\"init_lora_weights\": \"lora_ga\"",
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        gn_peft *peft = NULL;
        gn_error err;
        cr_assert_eq(open_with(&peft, refused[i], &err), GN_EUNSUPPORTED, "%s", refused[i]);
        cr_assert_null(peft);
        char name[64]; /* the option with its quotes */
        snprintf(name, sizeof name, "%.*s", (int)strcspn(refused[i], ":"), refused[i]);
        cr_assert(strstr(err.message, name), "%s: %s", refused[i], err.message);
        cr_assert(strstr(err.message, path), "%s: %s", refused[i], err.message);
    }
}

Test(peft, options_that_do_not) {
    static const char *const harmless[] = {
        "\"use_dora\": false",
        "\"modules_to_save\": null",
        "\"modules_to_save\": []",
        "\"trainable_token_indices\": null",
        "\"layer_replication\": null",
        "\"bias\": \"none\"",
        "\"init_lora_weights\": true",
        "\"init_lora_weights\": false",
        "\"init_lora_weights\": \"gaussian\"",
        "\"init_lora_weights\": \"eva\"",
        "\"init_lora_weights\": \"orthogonal\"",
        "\"loftq_config\": {\"loftq_bits\": 4}",
        "\"corda_config\": {\"a\": 1}",
        "\"layers_to_transform\": [0, 1], \"layers_pattern\": \"layers\"",
        "\"runtime_config\": {\"ephemeral_gpu_offload\": true}",
        "\"base_model_name_or_path\": \"x\", \"revision\": \"main\", \"task_type\": \"CAUSAL_LM\"",
        "\"inference_mode\": true, \"peft_version\": \"0.21.0\", \"lora_dropout\": 0.05",
        "\"megatron_core\": \"megatron.core\", \"qalora_group_size\": 16",
        "\"auto_mapping\": {\"base_model_class\": \"LlamaForCausalLM\"}",
        "\"an_option_of_tomorrow\": 0, \"b\": \"\", \"c\": {}, \"d\": [], \"e\": false",
    };
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        gn_peft *peft = NULL;
        gn_error err;
        cr_assert_eq(open_with(&peft, harmless[i], &err), GN_OK, "%s: %s", harmless[i],
                     err.message);
        gn_peft_close(peft);
    }
}

Test(peft, malformed) {
    static const struct {
        const char *text;
        gn_status status;
        const char *says;
    } cases[] = {
        {"", GN_EFORMAT, "line 1"},
        {"{\n\"r\": 8,\n}", GN_EFORMAT, "line 3"},
        {"{\"r\": 8} x", GN_EFORMAT, "JSON"},
        {"[1]", GN_EFORMAT, "object"},
        {"{}", GN_EFORMAT, "\"peft_type\" is missing"},
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 1}", GN_EFORMAT, "\"r\" is missing"},
        {"{\"peft_type\": \"LORA\", \"r\": 1}", GN_EFORMAT, "\"lora_alpha\" is missing"},
        {"{\"peft_type\": \"IA3\"}", GN_EUNSUPPORTED, "IA3"},
        {"{\"peft_type\": 1}", GN_EUNSUPPORTED, "peft_type"},
        {"{\"r\": 0}", GN_EFORMAT, "65536"},
        {"{\"r\": -8}", GN_EFORMAT, "65536"},
        {"{\"r\": 2.5}", GN_EFORMAT, "65536"},
        {"{\"r\": 1e30}", GN_EFORMAT, "65536"},
        {"{\"r\": \"8\"}", GN_EFORMAT, "65536"},
        {"{\"r\": 8, \"r\": 16}", GN_EFORMAT, "\"r\" appears twice"},
        {"{\"lora_alpha\": 1e999}", GN_EFORMAT, "finite"},
        {"{\"lora_alpha\": null}", GN_EFORMAT, "finite"},
        {"{\"use_rslora\": 1}", GN_EFORMAT, "true or false"},
        {"{\"rank_pattern\": [4]}", GN_EFORMAT, "patterns"},
        {"{\"rank_pattern\": {\"q_proj\": 0}}", GN_EFORMAT, "q_proj"},
        {"{\"rank_pattern\": {\"q_proj\": 4.5}}", GN_EFORMAT, "q_proj"},
        {"{\"alpha_pattern\": {\"a\": 1, \"q_proj\": \"x\"}}", GN_EFORMAT, "q_proj"},
        {"{\"rank_pattern\": {\"[0-9].x\": 4, \"(?=q)q\": 4}}", GN_EUNSUPPORTED, "(?=q)q"},
        {"{\"target_modules\": 1}", GN_EFORMAT, "list of strings"},
        {"{\"target_modules\": [1]}", GN_EFORMAT, "list of strings"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_peft *peft = NULL;
        gn_error err;
        cr_assert_eq(open_text(&peft, cases[i].text, &err), cases[i].status, "%s: %s",
                     cases[i].text, err.message);
        cr_assert_null(peft);
        cr_assert(strstr(err.message, cases[i].says), "%s: %s", cases[i].text, err.message);
        cr_assert(strstr(err.message, path), "%s: %s", cases[i].text, err.message);
    }
}

Test(peft, missing_or_unreadable) {
    gn_peft *peft = NULL;
    gn_error err = {0};
    cr_assert_eq(gn_peft_open(&peft, dir, &err), GN_ENOENT);
    cr_assert(strstr(err.message, path), "%s", err.message);
    cJSON *json = NULL;
    cr_assert_eq(gn_json_read(&json, dir, &err), GN_EIO, "%s", err.message);
    cr_assert_null(json);
    gn_peft_close(NULL);
}

/* Too large, and nested too deeply for a recursive parser. */
Test(peft, hostile_sizes) {
    const size_t n = (size_t)17 << 20;
    char *text = malloc(n);
    cr_assert(text);
    cJSON *json = NULL;
    gn_error err = {0};
    memset(text, ' ', n);
    write_file(text, n);
    cr_assert_neq(gn_json_read(&json, path, &err), GN_OK);
    memset(text, '[', n / 2);
    write_file(text, n / 2);
    cr_assert_eq(gn_json_read(&json, path, &err), GN_EFORMAT, "%s", err.message);
    free(text);
}

Test(peft, cut_at_every_length) {
    static const char text[] = "{\"peft_type\": \"LORA\", \"r\": 8, \"lora_alpha\": 16, "
                               "\"rank_pattern\": {\"(q|v)_proj\": 4}, \"target_modules\": "
                               "[\"q_proj\"], \"auto_mapping\": {\"a\": [1, {\"b\": null}]}}";
    gn_peft *peft = NULL;
    gn_error err;
    for (size_t n = 0; n < sizeof text - 1; n++) {
        write_file(text, n);
        cr_assert_eq(gn_peft_open(&peft, dir, &err), GN_EFORMAT, "%zu", n);
    }
    write_file(text, sizeof text - 1);
    cr_assert_eq(gn_peft_open(&peft, dir, &err), GN_OK);
    gn_peft_close(peft);
}
