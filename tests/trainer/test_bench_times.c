/* Rates, gaps and percentiles from the moments at which tokens came. */
#include "trainer/bench_times.h"

#include <criterion/criterion.h>
#include <math.h>

static void expect(double got, double expected) {
    cr_assert(fabs(got - expected) <= 1e-12 * fabs(expected), "%.17g, expected %.17g", got,
              expected);
}

Test(bench_times, one_stream) {
    double at[] = {11, 12, 13, 14, 15};
    const gn_token_times s = {at, 5};
    expect(gn_rate_overall(&s, 1, 10), 1); /* five in five seconds */
    expect(gn_rate_decoding(&s, 1), 1);    /* four in four */
    expect(gn_last_first_token(&s, 1), 11);
}

Test(bench_times, streams_that_overlap) {
    double a[] = {2, 3, 4, 5, 6}, b[] = {4, 5, 6, 7, 8};
    const gn_token_times s[] = {{a, 5}, {b, 5}};
    expect(gn_rate_overall(s, 2, 0), 10.0 / 8);
    expect(gn_rate_decoding(s, 2), 2); /* 5 and 6 of both, between 4 and 6 */
    expect(gn_last_first_token(s, 2), 4);
}

/* The first ends before the last begins: 64 streams that take turns. */
Test(bench_times, streams_that_never_meet) {
    double a[] = {1, 2}, b[] = {3, 4};
    const gn_token_times s[] = {{a, 2}, {b, 2}};
    expect(gn_rate_overall(s, 2, 0), 1);
    expect(gn_rate_decoding(s, 2), 0);
}

Test(bench_times, streams_without_tokens) {
    double a[] = {1, 2}, b[1];
    const gn_token_times s[] = {{a, 2}, {b, 0}};
    expect(gn_rate_overall(s, 2, 0), 1);
    expect(gn_rate_overall(s + 1, 1, 0), 0);
    expect(gn_rate_decoding(s, 2), 0);
    expect(gn_last_first_token(s, 2), 0);
}

Test(bench_times, gaps) {
    double a[] = {1, 2, 4}, b[] = {5}, gaps[2];
    const gn_token_times s[] = {{a, 3}, {b, 1}};
    cr_assert_eq(gn_token_gaps(NULL, s, 2), 2);
    cr_assert_eq(gn_token_gaps(gaps, s, 2), 2);
    expect(gaps[0], 1);
    expect(gaps[1], 2);
}

Test(bench_times, medians_and_percentiles) {
    double odd[] = {3, 1, 2}, even[] = {4, 1, 3, 2}, hundred[100];
    expect(gn_median(odd, 3), 2);
    expect(gn_median(even, 4), 2.5);
    for (int i = 0; i < 100; i++) hundred[i] = 100 - i;
    expect(gn_percentile(hundred, 100, 0.5), 50);
    expect(gn_percentile(hundred, 100, 0.99), 99);
    expect(gn_percentile(hundred, 100, 1), 100);
    expect(gn_percentile(hundred, 100, 0), 1);
    expect(gn_percentile(odd, 1, 0.99), 1);
}

Test(bench_times, room_for_replies) {
    gn_token_times *s = gn_token_times_open(3, 2);
    cr_assert(s);
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 2; j++) s[i].at[s[i].n++] = 2 * i + j + 1;
    expect(s[2].at[1], 6);
    expect(s[0].at[1], 2);
    gn_token_times_close(s);
    gn_token_times_close(NULL);
}
