/* config.json: what is understood, what is refused, and rope frequencies. */
#include "engine/config.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/folder.h"

#define SIZES                                                                                      \
    "\"model_type\":\"llama\",\"hidden_size\":128,\"intermediate_size\":352,"                      \
    "\"num_hidden_layers\":3,\"num_attention_heads\":4,\"vocab_size\":512"

TestSuite(config, .init = test_folder_make, .fini = test_folder_remove);

static gn_status read_text(const char *text, gn_config *c, gn_error *err) {
    test_write_text("config.json", text);
    *err = (gn_error){0};
    const gn_status status = gn_config_read(c, test_path(""), err);
    cr_assert_eq(status, err->status);
    return status;
}

Test(config, fills_in_what_a_file_leaves_out) {
    gn_config c;
    gn_error err;
    cr_assert_eq(read_text("{" SIZES "}", &c, &err), GN_OK, "%s", err.message);
    cr_assert_eq(c.kv_heads, 4);
    cr_assert_eq(c.head_dim, 32);
    cr_assert_eq(c.max_positions, 2048);
    cr_assert_eq(c.bos, -1);
    cr_assert_eq(c.n_eos, 0);
    cr_assert_float_eq(c.rope_theta, 10000, 0);
    cr_assert(!c.tied_embeddings && !c.bnb_4bit);
}

Test(config, understands_the_family) {
    gn_config c;
    gn_error err;
    cr_assert_eq(read_text("{" SIZES ",\"num_key_value_heads\":2,\"head_dim\":64,"
                           "\"eos_token_id\":[2,7],\"bos_token_id\":1,\"tie_word_embeddings\":true,"
                           "\"rope_scaling\":{\"type\":\"linear\",\"factor\":4}}",
                           &c, &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(c.kv_heads, 2);
    cr_assert_eq(gn_proj_rows(&c, GN_Q), 256);
    cr_assert_eq(gn_proj_rows(&c, GN_V), 128);
    cr_assert_eq(gn_proj_cols(&c, GN_O), 256);
    cr_assert_eq(gn_proj_cols(&c, GN_DOWN), 352);
    cr_assert_eq(c.n_eos, 2);
    cr_assert_eq(c.eos[1], 7);
    cr_assert(c.tied_embeddings);
    cr_assert_eq(c.rope_type, GN_ROPE_LINEAR);
    cr_assert_eq(read_text("{" SIZES ",\"rope_parameters\":{\"rope_type\":\"default\","
                           "\"rope_theta\":500000}}",
                           &c, &err),
                 GN_OK, "%s", err.message);
    cr_assert_float_eq(c.rope_theta, 500000, 0);
}

Test(config, refuses_by_name) {
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "config.json"},
        {"[1]", "config.json"},
        {"{\"model_type\":\"gpt2\"}", "gpt2"},
        {"{\"model_type\":\"llama\"}", "num_hidden_layers is missing"},
        {"{" SIZES ",\"attention_bias\":true}", "attention_bias"},
        {"{" SIZES ",\"mlp_bias\":true}", "mlp_bias"},
        {"{" SIZES ",\"hidden_act\":\"gelu\"}", "hidden_act is gelu"},
        {"{" SIZES ",\"num_key_value_heads\":3}", "num_key_value_heads"},
        {"{" SIZES ",\"num_key_value_heads\":2.5}", "num_key_value_heads"},
        {"{" SIZES ",\"head_dim\":33}", "head_dim"},
        {"{" SIZES ",\"max_position_embeddings\":1e9}", "max_position_embeddings"},
        {"{" SIZES ",\"rms_norm_eps\":0}", "rms_norm_eps"},
        {"{" SIZES ",\"rope_theta\":-1}", "rope_theta"},
        {"{" SIZES ",\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2}}", "yarn"},
        {"{" SIZES ",\"rope_scaling\":{\"rope_type\":\"linear\"}}", "factor"},
        {"{" SIZES ",\"eos_token_id\":512}", "eos_token_id"},
        {"{" SIZES ",\"eos_token_id\":[1,2,3,4,5,6,7,8,9]}", "eos_token_id"},
        {"{" SIZES ",\"bos_token_id\":\"<s>\"}", "bos_token_id"},
        {"{" SIZES ",\"quantization_config\":{\"quant_method\":\"gptq\"}}", "gptq"},
        {"{" SIZES ",\"quantization_config\":{\"quant_method\":\"bitsandbytes\"}}", "load_in_4bit"},
        {"{\"model_type\":\"mistral\",\"sliding_window\":4096}", "sliding_window"},
        {"{" SIZES, "line 1"},
        {"{" SIZES "} {}", "line 1"},
        {"{" SIZES ",\"model_type\":7}", "model_type"},
        {"{" SIZES ",\"hidden_size\":0}", "hidden_size"},
        {"{" SIZES ",\"hidden_size\":-128}", "hidden_size"},
        {"{" SIZES ",\"hidden_size\":130}", "hidden_size 130"},
        {"{" SIZES ",\"hidden_size\":1048577}", "hidden_size"},
        {"{" SIZES ",\"hidden_size\":\"128\"}", "hidden_size"},
        {"{" SIZES ",\"vocab_size\":1e400}", "vocab_size"},
        {"{" SIZES ",\"num_attention_heads\":256}", "not a multiple of 256 heads"},
        {"{" SIZES ",\"head_dim\":1026}", "head_dim"},
        {"{" SIZES ",\"attention_bias\":1}", "attention_bias"},
        {"{" SIZES ",\"tie_word_embeddings\":\"yes\"}", "tie_word_embeddings"},
        {"{" SIZES ",\"hidden_act\":3}", "hidden_act"},
        {"{" SIZES ",\"rms_norm_eps\":\"1e-6\"}", "rms_norm_eps"},
        {"{" SIZES ",\"rope_theta\":1e300}", "rope_theta"},
        {"{" SIZES ",\"rope_scaling\":\"dynamic\"}", "rope_scaling"},
        {"{" SIZES ",\"rope_scaling\":{\"factor\":2}}", "rope scaling"},
        {"{" SIZES ",\"rope_scaling\":{\"type\":3,\"factor\":2}}", "rope scaling"},
        {"{" SIZES ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":0.5}}", "factor"},
        {"{" SIZES ",\"rope_parameters\":7}", "rope_parameters"},
        {"{" SIZES ",\"rope_parameters\":{\"rope_type\":\"dynamic\"}}", "dynamic"},
        {"{" SIZES ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}}", "low_freq_factor"},
        {"{" SIZES ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
         "\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}}",
         "high_freq_factor"},
        {"{" SIZES ",\"eos_token_id\":-1}", "eos_token_id"},
        {"{" SIZES ",\"eos_token_id\":[2,1.5]}", "eos_token_id"},
        {"{" SIZES ",\"bos_token_id\":512}", "bos_token_id"},
        {"{" SIZES ",\"quantization_config\":true}", "quantization_config"},
        {"{" SIZES ",\"quantization_config\":{\"load_in_4bit\":true,"
         "\"bnb_4bit_quant_type\":\"int4\"}}",
         "int4"},
        {"{" SIZES ",\"quantization_config\":{\"load_in_4bit\":true,"
         "\"bnb_4bit_quant_storage\":\"bfloat16\"}}",
         "bnb_4bit_quant_storage is bfloat16"},
        {"{" SIZES ",\"quantization_config\":{\"load_in_4bit\":false,\"load_in_8bit\":true}}",
         "load_in_4bit"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gn_config c;
        gn_error err;
        cr_assert_neq(read_text(cases[i].text, &c, &err), GN_OK, "%s", cases[i].text);
        cr_assert(strstr(err.message, cases[i].says), "%s: %s", cases[i].text, err.message);
        cr_assert(strstr(err.message, test_path("config.json")), "%s", err.message);
    }
    gn_config c;
    gn_error err = {0};
    cr_assert_eq(gn_config_read(&c, "/nonexistent", &err), GN_ENOENT);
    cr_assert(strstr(err.message, "/nonexistent/config.json"), "%s", err.message);
}

/* Of keys that stand there twice the last counts, as in Python; null is as good as absent. */
Test(config, reads_objects_as_python_does) {
    gn_config c;
    gn_error err;
    cr_assert_eq(read_text("{" SIZES ",\"vocab_size\":600,\"num_key_value_heads\":null,"
                           "\"head_dim\":null,\"rope_scaling\":null,\"eos_token_id\":null,"
                           "\"attention_bias\":false,\"mlp_bias\":null,\"sliding_window\":4096,"
                           "\"quantization_config\":null}",
                           &c, &err),
                 GN_OK, "%s", err.message);
    cr_assert_eq(c.vocab, 600);
    cr_assert_eq(c.kv_heads, 4);
    cr_assert_eq(c.head_dim, 32);
    cr_assert_not(c.bnb_4bit);
    cr_assert_eq(
        read_text("{" SIZES ",\"model_type\":\"mistral\",\"sliding_window\":null}", &c, &err),
        GN_OK, "%s", err.message);
    cr_assert_str_eq(c.model_type, "mistral");
}

Test(config, refuses_deep_nesting_and_large_files) {
    static char text[(16 << 20) + 2];
    gn_config c;
    gn_error err;
    memset(text, '[', 100000);
    cr_assert_eq(read_text(text, &c, &err), GN_EFORMAT);
    memset(text, ' ', sizeof text - 1);
    cr_assert_eq(read_text(text, &c, &err), GN_ETOOBIG, "%s", err.message);
}

Test(config, llama3_frequencies_equal_transformers) {
    /* modeling_rope_utils' formula for Llama 3.1's parameters, head size 128 */
    static const struct {
        int i;
        float inv_freq;
    } expected[] = {{0, 1.0f},
                    {20, 0.0165604409f},
                    {28, 0.00321144611f},
                    {29, 0.00216657045f},
                    {30, 0.00137189366f},
                    {32, 0.000524846055f},
                    {34, 0.000178507802f},
                    {35, 9.55621217e-05f},
                    {40, 3.42810235e-05f},
                    {63, 3.06892588e-07f}};
    gn_config c;
    gn_error err;
    float inv_freq[64];
    cr_assert_eq(read_text("{" SIZES ",\"head_dim\":128,\"rope_theta\":500000.0,\"rope_scaling\":{"
                           "\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
                           "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}}",
                           &c, &err),
                 GN_OK, "%s", err.message);
    gn_config_inv_freq(&c, inv_freq);
    for (size_t k = 0; k < sizeof expected / sizeof *expected; k++) {
        const float want = expected[k].inv_freq, found = inv_freq[expected[k].i];
        cr_assert_float_eq(found, want, 3e-7f * want, "%d: %.9g, expected %.9g", expected[k].i,
                           (double)found, (double)want);
    }
}

/* Llama 3.1's parameters: the highest frequency is kept, the lowest divided by the factor. */
Test(config, rope_frequencies_are_scaled) {
    gn_config c = {.head_dim = 128, .rope_theta = 500000};
    float plain[64], scaled[64];
    gn_config_inv_freq(&c, plain);
    cr_assert_float_eq(plain[0], 1, 0);
    cr_assert_float_eq(plain[63], powf(500000, -126.0f / 128), 1e-10f);
    c.rope_type = GN_ROPE_LINEAR;
    c.rope_factor = 4;
    gn_config_inv_freq(&c, scaled);
    for (int i = 0; i < 64; i++) cr_assert_float_eq(scaled[i], plain[i] / 4, 1e-9f);
    c.rope_type = GN_ROPE_LLAMA3;
    c.rope_factor = 8;
    c.rope_low_freq_factor = 1;
    c.rope_high_freq_factor = 4;
    c.rope_original_positions = 8192;
    gn_config_inv_freq(&c, scaled);
    cr_assert_float_eq(scaled[0], plain[0], 0);
    cr_assert_float_eq(scaled[63], plain[63] / 8, 1e-12f);
    for (int i = 1; i < 64; i++) {
        cr_assert_leq(scaled[i], plain[i]);
        cr_assert_geq(scaled[i] * 8.001f, plain[i]);
        cr_assert_lt(scaled[i], scaled[i - 1]);
    }
}
