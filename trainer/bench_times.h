/* bench_times.h - what the moments at which tokens came say. Seconds throughout. */
#ifndef GN_BENCH_TIMES_H
#define GN_BENCH_TIMES_H

#include <stddef.h>

/* When each token of a reply came, in order. */
typedef struct gn_token_times {
    double *at;
    int n;
} gn_token_times;

/* Room for n replies of up to `tokens` each; NULL when memory is short. */
gn_token_times *gn_token_times_open(int n, int tokens);
void gn_token_times_close(gn_token_times *streams);

/* Tokens a second over the whole load: all tokens, from `begin` to the last of them. 0: none. */
double gn_rate_overall(const gn_token_times *streams, int n, double begin);
/* Tokens a second while all streams decode: from the last stream's first token to the first
 * stream's last. 0: that never happened. */
double gn_rate_decoding(const gn_token_times *streams, int n);

/* Of the streams' first tokens, that of the last to get one; 0 when one got none. */
double gn_last_first_token(const gn_token_times *streams, int n);

/* Writes the gaps between successive tokens of each stream and returns how many there are; NULL
 * only counts. */
size_t gn_token_gaps(double *gaps, const gn_token_times *streams, int n);

/* Each of these sorts the values. n is at least 1; share is 0 to 1. */
double gn_median(double *values, int n);
double gn_percentile(double *values, size_t n, double share); /* the nearest rank */

#endif
