/* train_metrics.h - metrics.jsonl: a line a logged step, and a line an evaluation. */
#ifndef GN_TRAIN_METRICS_H
#define GN_TRAIN_METRICS_H

#include <cjson/cJSON.h>

#include "kernels/base.h"

typedef struct gn_metrics gn_metrics;

/* Opens OUTPUT/metrics.jsonl and cuts off what stands after `bytes`: what a run wrote that goes on
 * from an earlier checkpoint. GN_EBUSY: another process has it open. */
GN_CHECKED gn_status gn_metrics_open(gn_metrics **out, const char *output, int64_t bytes,
                                     gn_error *err);
void gn_metrics_close(gn_metrics *m);

/* Appends an object (taken over; NULL means no memory) as one line; with `print` also to stdout. */
GN_CHECKED gn_status gn_metrics_write_take(gn_metrics *m, cJSON *line, bool print, gn_error *err);
/* Makes all lines last, and says how long the file is. */
GN_CHECKED gn_status gn_metrics_sync(gn_metrics *m, int64_t *bytes, gn_error *err);

#endif
