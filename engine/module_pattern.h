/* module_pattern.h - the keys of PEFT's rank_pattern and alpha_pattern.
 *
 * A key is a regular expression K, and a module is meant when its name matches (.*\.)?(K)$ from
 * its beginning: "q_proj" and "layers.0.self_attn.q_proj" name modules by their last parts. */
#ifndef GN_MODULE_PATTERN_H
#define GN_MODULE_PATTERN_H

#include "kernels/base.h"

typedef struct gn_module_pattern {
    const char *key;                 /* borrowed */
    struct gn_pattern_node *program; /* NULL for a plain key: letters, digits, "_", "-" and "." */
    int nodes;
} gn_module_pattern;

/* `key` must outlive the pattern. Of Python's syntax, literals, . [...] | (...) (?:...) * + ? ^ $
 * \d \w and escaped punctuation are understood; the rest ({m,n}, lookahead, back references ...)
 * is GN_EUNSUPPORTED. `where` names the key's place in messages. */
GN_CHECKED gn_status gn_module_pattern_open(gn_module_pattern *pattern, const char *key,
                                            const char *where, gn_error *err);
/* Takes time proportional to both lengths, whatever the pattern. */
bool gn_module_pattern_match(const gn_module_pattern *pattern, const char *module);
void gn_module_pattern_close(gn_module_pattern *pattern);

#endif
