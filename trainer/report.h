/* report.h - a training run as one page to look at. */
#ifndef GN_REPORT_H
#define GN_REPORT_H

#include "kernels/base.h"

/* Makes OUTPUT/report.html, which needs nothing else, of OUTPUT/metrics.jsonl and, as the run's
 * settings, OUTPUT/train_config.json, if that is there. A last line that is not whole yet is passed
 * over; any other that is wrong is GN_EFORMAT, naming file and line. On failure a report that
 * stands there stays. */
GN_CHECKED gn_status gn_report_write(const char *output_dir, gn_error *err);

#endif
