/* bench_times.c - what the moments at which tokens came say. */
#include "trainer/bench_times.h"

#include <math.h>
#include <stdlib.h>

gn_token_times *gn_token_times_open(int n, int tokens) {
    gn_token_times *streams = calloc((size_t)n, sizeof *streams);
    double *at = calloc((size_t)n * (size_t)tokens, sizeof *at);
    if (!streams || !at) {
        free(streams);
        free(at);
        return NULL;
    }
    for (int i = 0; i < n; i++) streams[i].at = at + (size_t)i * (size_t)tokens;
    return streams;
}

void gn_token_times_close(gn_token_times *streams) {
    if (streams) free(streams[0].at);
    free(streams);
}

double gn_rate_overall(const gn_token_times *streams, int n, double begin) {
    double end = begin, tokens = 0;
    for (int i = 0; i < n; i++) {
        if (streams[i].n == 0) continue;
        end = fmax(end, streams[i].at[streams[i].n - 1]);
        tokens += streams[i].n;
    }
    return end > begin ? tokens / (end - begin) : 0;
}

double gn_last_first_token(const gn_token_times *streams, int n) {
    double last = 0;
    for (int i = 0; i < n; i++) {
        if (streams[i].n == 0) return 0;
        last = fmax(last, streams[i].at[0]);
    }
    return last;
}

double gn_rate_decoding(const gn_token_times *streams, int n) {
    const double begin = gn_last_first_token(streams, n);
    double end = INFINITY, tokens = 0;
    if (begin == 0) return 0;
    for (int i = 0; i < n; i++) end = fmin(end, streams[i].at[streams[i].n - 1]);
    if (end <= begin) return 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < streams[i].n; j++)
            tokens += streams[i].at[j] > begin && streams[i].at[j] <= end;
    return tokens / (end - begin);
}

size_t gn_token_gaps(double *gaps, const gn_token_times *streams, int n) {
    size_t count = 0;
    for (int i = 0; i < n; i++)
        for (int j = 1; j < streams[i].n; j++, count++)
            if (gaps) gaps[count] = streams[i].at[j] - streams[i].at[j - 1];
    return count;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double gn_median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, ascending);
    return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

double gn_percentile(double *values, size_t n, double share) {
    qsort(values, n, sizeof *values, ascending);
    const size_t rank = (size_t)ceil(share * (double)n);
    return values[rank > 0 ? rank - 1 : 0];
}
