/* AdamW on the GPU against the CPU: equal to the bit, moments and parameters, over three steps. */
#include "device.h"
#include "tests/kernels/adamw_cases.h"

/* The arrays of `host` on the device. */
static adamw_arrays on_device(device_memory *m, const adamw_arrays *host) {
    const size_t n = (size_t)host->c.n, absmax = adamw_blocks(host->c.n) * sizeof(float);
    const size_t moment = n * gn_dtype_size(host->c.moments);
    return (adamw_arrays){host->c,
                          device_alloc(m, host->master, n * sizeof(float), 0),
                          device_alloc(m, host->m_absmax, absmax, 0),
                          device_alloc(m, host->v_absmax, absmax, 0),
                          device_alloc(m, host->weight, n * sizeof(float), 0),
                          device_alloc(m, host->grad, n * gn_dtype_size(host->c.grad), 0),
                          device_alloc(m, host->m, moment, 0),
                          device_alloc(m, host->v, moment, 0)};
}

static bool is_equal(gn_ctx *gpu, const void *there, const void *here, size_t bytes) {
    void *copy = malloc(bytes);
    cr_assert_eq(gn_ctx_read(gpu, copy, there, bytes), GN_OK);
    const bool equal = memcmp(copy, here, bytes) == 0;
    free(copy);
    return equal;
}

static const char *difference(gn_ctx *gpu, const adamw_arrays *there, const adamw_arrays *here) {
    const size_t n = (size_t)here->c.n, absmax = adamw_blocks(here->c.n) * sizeof(float);
    const size_t moment = n * gn_dtype_size(here->c.moments);
    if (!is_equal(gpu, there->m, here->m, moment)) return "m differs";
    if (!is_equal(gpu, there->v, here->v, moment)) return "v differs";
    if (!is_equal(gpu, there->master, here->master, n * sizeof(float))) return "master differs";
    if (!is_equal(gpu, there->weight, here->weight, n * sizeof(float))) return "weight differs";
    if (here->c.moments != GN_U8) return NULL;
    if (!is_equal(gpu, there->m_absmax, here->m_absmax, absmax)) return "absmax of m differs";
    return is_equal(gpu, there->v_absmax, here->v_absmax, absmax) ? NULL : "absmax of v differs";
}

Test(gpu_adamw, equals_the_cpu) {
    sides s = open_sides(GN_BF16);
    tally tally = {0};
    for (int k = 0; k < COUNT(adamw_cases); k++) {
        adamw_arrays host = adamw_arrays_open(&adamw_cases[k], (uint64_t)k);
        device_memory memory = {.ctx = s.gpu};
        adamw_arrays device = on_device(&memory, &host);
        verdict v = {0};
        snprintf(v.name, sizeof v.name, "adamw case %d", k);
        const char *why = NULL;
        for (int step = 1; step <= 3 && !why; step++) {
            const gn_adamw_args here = adamw_args_of(&host, step);
            const gn_adamw_args there = adamw_args_of(&device, step);
            cr_assert_eq(gn_adamw(s.cpu, &here), GN_OK);
            why = ran(s.gpu, gn_adamw(s.gpu, &there), v.name);
        }
        if (!why) why = difference(s.gpu, &device, &host);
        if (!why && !guards_stand(&memory)) why = "a guard is written";
        settle(&tally, &v, why);
        device_free(&memory);
        adamw_arrays_close(&host);
    }
    close_sides(&s);
    conclude(&tally, "adamw");
}

Test(gpu_adamw, sums_of_squares) {
    const int64_t sizes[] = {1, 255, 131072, 131073, 1000003};
    const gn_dtype dtypes[] = {GN_F32, GN_BF16};
    sides s = open_sides(GN_BF16);
    reserve(s.gpu, GN_SUM_WORKSPACE);
    reserve(s.cpu, GN_SUM_WORKSPACE);
    for (int k = 0; k < COUNT(sizes) * COUNT(dtypes); k++) {
        const int64_t n = sizes[k / 2];
        const gn_dtype dtype = dtypes[k % 2];
        rng r = {(uint64_t)k};
        void *values = random_values(&r, dtype, (size_t)n);
        device_memory memory = {.ctx = s.gpu};
        const double zero = 0;
        double expected = 0, got[2];
        double *sum = device_alloc(&memory, &zero, sizeof zero, 0);
        const size_t bytes = (size_t)n * gn_dtype_size(dtype);
        const gn_tensor here = gn_tensor_1d(values, dtype, n);
        const gn_tensor there = gn_tensor_1d(device_alloc(&memory, values, bytes, 0), dtype, n);
        cr_assert_eq(gn_sum_squares(s.cpu, &expected, &here), GN_OK);
        for (int i = 0; i < 2; i++) {
            cr_assert_eq(gn_ctx_zero(s.gpu, sum, sizeof *sum), GN_OK);
            cr_assert_eq(gn_sum_squares(s.gpu, sum, &there), GN_OK);
            cr_assert_eq(gn_ctx_read(s.gpu, &got[i], sum, sizeof *sum), GN_OK);
        }
        cr_assert(fabs(got[0] - expected) <= 1e-11 * expected, "n=%lld", (long long)n);
        cr_assert(memcmp(&got[0], &got[1], sizeof *got) == 0, "a second run differs");
        cr_assert(guards_stand(&memory));
        device_free(&memory);
        free(values);
    }
    close_sides(&s);
}
