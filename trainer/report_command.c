/* report_command.c - `guanaco-trainer report`: the page of a training run, made anew. */
#include <stdio.h>

#include "trainer/report.h"
#include "trainer/trainer.h"

typedef struct report_options {
    const char *output_dir;
} report_options;

static const char usage[] =
    "usage: guanaco-trainer report --output-dir DIR\n"
    "\nMakes DIR/report.html of the metrics.jsonl that a training run writes there.\n\n";

static const gn_option table[] = {{GN_OPT_STRING, "output-dir",
                                   offsetof(report_options, output_dir), .value = "DIR",
                                   .help = "the run's folder"},
                                  GN_OPTION_END};

static gn_status run(const report_options *o, gn_error *err) {
    if (!o->output_dir) return gn_fail(err, GN_EINVAL, "--output-dir DIR is missing");
    const gn_status status = gn_report_write(o->output_dir, err);
    if (!status) printf("%s/report.html\n", o->output_dir);
    return status;
}

int gn_report_command(int n, char *const *args) {
    report_options o;
    int exit_status;
    gn_error err = {0};
    if (!gn_command_options(table, &o, usage, n, args, &exit_status)) return exit_status;
    return run(&o, &err) ? gn_command_failed(&err) : 0;
}
