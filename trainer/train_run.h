/* train_run.h - a run in memory, shared by train.c (the loop), train_state.c (saving and going on),
 * train_mmlu.c and train_report.c (what is said about it). */
#ifndef GN_TRAIN_RUN_H
#define GN_TRAIN_RUN_H

#include "trainer/checkpoint.h"
#include "trainer/train.h"
#include "trainer/train_data.h"
#include "trainer/train_memory.h"
#include "trainer/train_metrics.h"
#include "trainer/trainable.h"

typedef struct gn_train_run {
    const gn_train_options *o;
    gn_communicator *c;
    gn_error *err;
    gn_train_data data;
    gn_trainable *trainable;
    gn_train_step *step;
    gn_train_memory memory; /* as planned */
    gn_page_device *device; /* of the optimizer's pages; NULL: they are used where they are */
    gn_optimizer *optimizer;
    gn_metrics *metrics; /* of the process that writes, as checkpoints are; NULL: another does */
    gn_train_state state;
    bool epoch_ended;     /* with the last step */
    int64_t begin;        /* the step that this session began after */
    double seconds;       /* of its steps */
    double shown_at;      /* in these, when progress was last shown */
    double since_log;     /* seconds and tokens of the steps since the last line */
    int64_t tokens_since; /* was written */
} gn_train_run;

/* What a step came to. */
typedef struct gn_step_result {
    double loss, grad_norm, learning_rate;
} gn_step_result;

/* ---- train_state.c ---- */

/* The output folder must be new, or, with --resume, is gone on from. */
GN_CHECKED gn_status gn_train_check_output(const gn_train_run *run);
/* Sets parameters, optimizer and state to the newest whole checkpoint's, or to the beginning. */
GN_CHECKED gn_status gn_train_begin(gn_train_run *run);
GN_CHECKED gn_status gn_train_save(gn_train_run *run);
/* Writes adapter/ or model/. */
GN_CHECKED gn_status gn_train_save_result(gn_train_run *run);

/* ---- train_mmlu.c ---- */

/* Asks all questions and reports what came of it. */
GN_CHECKED gn_status gn_train_mmlu(gn_train_run *run);

/* ---- train_report.c ---- */

/* One step is done and took so long: draws the progress line, and logs the step when it is due. */
GN_CHECKED gn_status gn_train_report_step(gn_train_run *run, const gn_step_result *result,
                                          double seconds, int64_t tokens);
GN_CHECKED gn_status gn_train_report_evaluation(gn_train_run *run, double loss, int64_t tokens);
GN_CHECKED gn_status gn_train_report_mmlu(gn_train_run *run);
/* What is about to be trained, on what. */
void gn_train_report_start(const gn_train_run *run);
/* How memory is divided; once there were steps, beside what was found to be used. */
void gn_train_report_memory(const gn_train_run *run);
/* Makes report.html anew. It is made of what is saved already: a failure ends nothing. */
void gn_train_report_page(const gn_train_run *run);

#endif
