/* report.c - metrics.jsonl into the page that trainer/report.html is.
 *
 * The page's script draws what stands in it as JSON. However long the run, that stays small: a
 * curve is cut into buckets of steps, and of each its least and its greatest value are kept, so
 * that no spike is lost. */
#include "trainer/report.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/json_file.h"
#include "engine/save_folder.h"

enum {
    BUCKETS = 600,
    SMOOTHED_POINTS = 600,
    MIN_SMOOTHED = 10, /* fewer points than that are not smoothed */
    SMOOTHING = 40,    /* a smoothed value is the mean of so many parts of the curve's points */
    MAX_LINE_BYTES = 1 << 16
};

/* Keys of metrics.jsonl; each is a curve over `step`. The last two are only summed up. */
#define CURVES(X)                                                                                  \
    X(loss)                                                                                        \
    X(grad_norm)                                                                                   \
    X(learning_rate)                                                                               \
    X(tok_s)                                                                                       \
    X(device_bytes)                                                                                \
    X(eval_loss)                                                                                   \
    X(mmlu_eval_accuracy)                                                                          \
    X(mmlu_test_accuracy)                                                                          \
    X(eval_ppl)                                                                                    \
    X(time)

enum {
#define X(name) CURVE_##name,
    CURVES(X)
#undef X
        N_CURVES
};

static const char *const curve_names[N_CURVES] = {
#define X(name) #name,
    CURVES(X)
#undef X
};

typedef struct point {
    double step, value;
} point;

typedef struct curve {
    point *points;
    size_t n, capacity;
} curve;

typedef struct run {
    const char *dir;
    char *metrics;                              /* path */
    double step;                                /* the last */
    curve curves[N_CURVES], smoothed[N_CURVES]; /* the latter of noisy ones */
    cJSON *settings;
    gn_error *err;
} run;

static gn_status no_memory(const run *r) {
    return gn_fail(r->err, GN_ENOMEM, "%s: no memory for the report", r->dir);
}

/* ---- reading ---- */

static bool add_point(curve *c, double step, double value) {
    if (c->n == c->capacity) {
        const size_t capacity = c->capacity ? 2 * c->capacity : 256;
        point *grown = realloc(c->points, capacity * sizeof *grown);
        if (!grown) return false;
        c->points = grown;
        c->capacity = capacity;
    }
    c->points[c->n++] = (point){step, value};
    return true;
}

/* A value that is null, as JSON writes what is not finite, is a gap. */
static gn_status take_line(run *r, const cJSON *line, gn_error *err) {
    const cJSON *step = cJSON_GetObjectItemCaseSensitive(line, "step");
    const cJSON *values[N_CURVES];
    if (!cJSON_IsObject(line)) return gn_fail(err, GN_EFORMAT, "not a JSON object");
    if (!cJSON_IsNumber(step) || !(step->valuedouble >= 0 && step->valuedouble < 1e15))
        return gn_fail(err, GN_EFORMAT, "\"step\" is not a number of steps");
    if (step->valuedouble < r->step)
        return gn_fail(err, GN_EFORMAT, "step %.0f comes after step %.0f", step->valuedouble,
                       r->step);
    for (int i = 0; i < N_CURVES; i++) {
        values[i] = cJSON_GetObjectItemCaseSensitive(line, curve_names[i]);
        if (values[i] && !cJSON_IsNumber(values[i]) && !cJSON_IsNull(values[i]))
            return gn_fail(err, GN_EFORMAT, "\"%s\" is not a number", curve_names[i]);
    }
    r->step = step->valuedouble;
    for (int i = 0; i < N_CURVES; i++) {
        if (cJSON_IsNumber(values[i]) && isfinite(values[i]->valuedouble) &&
            !add_point(&r->curves[i], r->step, values[i]->valuedouble))
            return gn_fail(err, GN_ENOMEM, "out of memory");
    }
    return GN_OK;
}

static bool at_end(FILE *f) {
    const int c = getc(f);
    if (c != EOF) ungetc(c, f);
    return c == EOF;
}

static gn_status read_lines(run *r, FILE *f) {
    char text[MAX_LINE_BYTES];
    for (long n = 1; fgets(text, sizeof text, f); n++) {
        gn_error err = {0};
        cJSON *line = cJSON_ParseWithLengthOpts(text, strlen(text) + 1, NULL, true);
        const gn_status status = take_line(r, line, &err);
        cJSON_Delete(line);
        if (status && !(status == GN_EFORMAT && at_end(f)))
            return gn_fail(r->err, status, "%s: line %ld: %s", r->metrics, n, err.message);
    }
    if (ferror(f)) return gn_fail(r->err, GN_EIO, "%s: %s", r->metrics, strerror(errno));
    for (int i = 0; i < CURVE_eval_ppl; i++)
        if (r->curves[i].n > 0) return GN_OK;
    return gn_fail(r->err, GN_EFORMAT, "%s: no step is logged in it", r->metrics);
}

static gn_status read_metrics(run *r) {
    FILE *f = fopen(r->metrics, "rbe");
    if (!f)
        return gn_fail(r->err, errno == ENOENT ? GN_ENOENT : GN_EIO, "%s: %s", r->metrics,
                       strerror(errno));
    const gn_status status = read_lines(r, f);
    fclose(f);
    return status;
}

static gn_status read_settings(run *r) {
    char *path;
    if (asprintf(&path, "%s/train_config.json", r->dir) < 0) return no_memory(r);
    gn_status status = gn_json_read(&r->settings, path, r->err);
    free(path);
    if (status == GN_ENOENT) {
        r->settings = cJSON_CreateObject();
        status = r->settings ? GN_OK : no_memory(r);
    }
    return status;
}

/* ---- what the page gets ---- */

static void print_point(FILE *f, const point *p, bool first) {
    fprintf(f, "%s[%.0f,%.7g]", first ? "" : ",", p->step, p->value);
}

static void print_thinned(FILE *f, const curve *c) {
    const size_t buckets = c->n > 2 * BUCKETS ? BUCKETS : c->n;
    for (size_t k = 0; k < buckets; k++) {
        const size_t begin = k * c->n / buckets, end = (k + 1) * c->n / buckets;
        size_t least = begin, greatest = begin;
        for (size_t i = begin; i < end; i++) {
            if (c->points[i].value < c->points[least].value) least = i;
            if (c->points[i].value > c->points[greatest].value) greatest = i;
        }
        print_point(f, &c->points[least < greatest ? least : greatest], k == 0);
        if (least != greatest)
            print_point(f, &c->points[least < greatest ? greatest : least], false);
    }
}

/* At each point the mean of those around it. False without memory. */
static bool smooth(curve *smoothed, const curve *c) {
    if (c->n < MIN_SMOOTHED) return true;
    const size_t half = c->n / (2 * SMOOTHING) + 1;
    const size_t n = c->n < SMOOTHED_POINTS ? c->n : SMOOTHED_POINTS;
    double *sums = malloc((c->n + 1) * sizeof *sums); /* of the first i values */
    bool ok = sums != NULL;
    if (ok) sums[0] = 0;
    for (size_t i = 0; ok && i < c->n; i++) sums[i + 1] = sums[i] + c->points[i].value;
    for (size_t k = 0; ok && k < n; k++) {
        const size_t i = k * (c->n - 1) / (n - 1);
        const size_t begin = i > half ? i - half : 0, end = i + half < c->n ? i + half + 1 : c->n;
        ok = add_point(smoothed, c->points[i].step,
                       (sums[end] - sums[begin]) / (double)(end - begin));
    }
    free(sums);
    return ok;
}

static gn_status smooth_curves(run *r) {
    static const int noisy[] = {CURVE_loss, CURVE_grad_norm, CURVE_tok_s};
    for (size_t i = 0; i < sizeof noisy / sizeof *noisy; i++)
        if (!smooth(&r->smoothed[noisy[i]], &r->curves[noisy[i]])) return no_memory(r);
    return GN_OK;
}

static void print_number(FILE *f, const char *name, const double *value) {
    if (value)
        fprintf(f, ",\"%s\":%.9g", name, *value);
    else
        fprintf(f, ",\"%s\":null", name);
}

static const double *last(const curve *c) {
    return c->n > 0 ? &c->points[c->n - 1].value : NULL;
}

static void print_summary(FILE *f, const run *r) {
    const curve *loss = &r->curves[CURVE_eval_loss], *ppl = &r->curves[CURVE_eval_ppl];
    const curve *rate = &r->curves[CURVE_tok_s], *bytes = &r->curves[CURVE_device_bytes];
    const curve *time = &r->curves[CURVE_time];
    const double seconds = time->n ? *last(time) - time->points[0].value : 0;
    const point *best = loss->points;
    double mean = 0, peak = 0, best_ppl = 0;
    for (size_t i = 1; i < loss->n; i++)
        if (loss->points[i].value < best->value) best = &loss->points[i];
    if (loss->n > 0) best_ppl = exp(best->value);
    for (size_t i = 0; i < ppl->n; i++)
        if (ppl->points[i].step == best->step) best_ppl = ppl->points[i].value;
    for (size_t i = 0; i < rate->n; i++) mean += rate->points[i].value / (double)rate->n;
    for (size_t i = 0; i < bytes->n; i++) peak = fmax(peak, bytes->points[i].value);
    fprintf(f, ",\"summary\":{\"steps\":%.0f", r->step);
    print_number(f, "loss", last(&r->curves[CURVE_loss]));
    print_number(f, "smoothed", last(&r->smoothed[CURVE_loss]));
    print_number(f, "eval_loss", loss->n ? &best->value : NULL);
    print_number(f, "eval_step", loss->n ? &best->step : NULL);
    print_number(f, "eval_ppl", loss->n ? &best_ppl : NULL);
    print_number(f, "seconds", time->n ? &seconds : NULL);
    print_number(f, "tok_s", rate->n ? &mean : NULL);
    print_number(f, "device_bytes", bytes->n ? &peak : NULL);
    fputs("},", f);
}

/* JSON as it may stand in a page: nothing in it closes the script's element. */
static bool print_json(FILE *f, const cJSON *value) {
    char *text = cJSON_PrintUnformatted(value);
    for (const char *p = text; p && *p; p++) {
        if (*p == '<')
            fputs("\\u003c", f);
        else
            fputc(*p, f);
    }
    cJSON_free(text);
    return text != NULL;
}

static bool print_name(FILE *f, const char *dir) {
    char *whole = realpath(dir, NULL);
    const char *name = whole ? strrchr(whole, '/') + 1 : dir;
    cJSON *string = cJSON_CreateString(name);
    const bool ok = string && print_json(f, string);
    cJSON_Delete(string);
    free(whole);
    return ok;
}

static void print_curves(FILE *f, const char *name, const curve *curves) {
    fprintf(f, "\"%s\":{", name);
    for (int i = 0; i < CURVE_eval_ppl; i++) {
        fprintf(f, "%s\n\"%s\":[", i ? "]," : "", curve_names[i]);
        print_thinned(f, &curves[i]);
    }
    fputs("]}", f);
}

static bool print_run(FILE *f, const run *r) {
    fputs("{\"name\":", f);
    bool ok = print_name(f, r->dir);
    fputs(",\"settings\":", f);
    ok = ok && print_json(f, r->settings);
    print_summary(f, r);
    print_curves(f, "series", r->curves);
    fputc(',', f);
    print_curves(f, "smoothed", r->smoothed);
    fputc('}', f);
    return ok;
}

/* ---- the page ---- */

extern const char gn_report_page[]; /* trainer/report.html */

static gn_status write_page(const run *r) {
    static const char mark[] = "@RUN@</script>";
    const char *place = strstr(gn_report_page, mark);
    char *path = NULL, *page = NULL;
    size_t size;
    FILE *f = open_memstream(&page, &size);
    bool ok = f && asprintf(&path, "%s/report.html", r->dir) >= 0;
    if (ok) {
        fwrite(gn_report_page, 1, (size_t)(place - gn_report_page), f);
        ok = print_run(f, r);
        fputs(place + strlen("@RUN@"), f);
    }
    if (f && fclose(f) != 0) ok = false;
    const gn_status status = ok ? gn_text_replace(path, page, r->err) : no_memory(r);
    free(page);
    free(path);
    return status;
}

gn_status gn_report_write(const char *output_dir, gn_error *err) {
    run r = {.dir = output_dir, .err = err};
    if (asprintf(&r.metrics, "%s/metrics.jsonl", output_dir) < 0) r.metrics = NULL;
    gn_status status = r.metrics ? read_metrics(&r) : no_memory(&r);
    if (!status) status = read_settings(&r);
    if (!status) status = smooth_curves(&r);
    if (!status) status = write_page(&r);
    for (int i = 0; i < N_CURVES; i++) {
        free(r.curves[i].points);
        free(r.smoothed[i].points);
    }
    cJSON_Delete(r.settings);
    free(r.metrics);
    return status;
}
