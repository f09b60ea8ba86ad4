/* criterion.h - what the tests use of Criterion, for the build under ThreadSanitizer: Criterion
 * itself maps memory at addresses that ThreadSanitizer forbids (Criterion's issue 274). Each test
 * runs in a process of its own, one after another; time limits are left to ctest. */
#ifndef GN_TEST_CRITERION_H
#define GN_TEST_CRITERION_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

typedef struct cr_options {
    void (*init)(void), (*fini)(void);
    double timeout;
} cr_options;

typedef struct cr_test {
    const char *suite, *name;
    void (*run)(void); /* NULL: the suite's options */
    cr_options options;
    struct cr_test *next;
} cr_test;

void cr_register(cr_test *test);
/* Says what failed, and where; ends the test when it is final. */
void cr_check(bool passed, bool final, const char *file, int line, const char *what,
              const char *fmt, ...) __attribute__((format(printf, 6, 7)));
void cr_log_info(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Ends the test. */
void cr_skip_test(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#define CR_REGISTER(id, suite_name, test_name, function, ...)                                      \
    __attribute__((constructor)) static void id##_register(void) {                                 \
        static cr_test test = {                                                                    \
            .suite = suite_name, .name = test_name, .run = function, .options = {__VA_ARGS__}};    \
        cr_register(&test);                                                                        \
    }
#define Test(suite, name, ...)                                                                     \
    static void suite##_##name##_test(void);                                                       \
    CR_REGISTER(suite##_##name, #suite, #name, suite##_##name##_test, __VA_ARGS__)                 \
    static void suite##_##name##_test(void)
#define TestSuite(suite, ...) CR_REGISTER(suite##_suite, #suite, "", NULL, __VA_ARGS__)

#define CR_CHECK(final, condition, ...)                                                            \
    cr_check(condition, final, __FILE__, __LINE__, #condition, " " __VA_ARGS__)
#define cr_assert(c, ...)              CR_CHECK(true, (bool)(c), __VA_ARGS__)
#define cr_assert_not(c, ...)          CR_CHECK(true, !(c), __VA_ARGS__)
#define cr_assert_fail(...)            CR_CHECK(true, false, __VA_ARGS__)
#define cr_assert_null(p, ...)         CR_CHECK(true, (p) == NULL, __VA_ARGS__)
#define cr_assert_not_null(p, ...)     CR_CHECK(true, (p) != NULL, __VA_ARGS__)
#define cr_assert_eq(a, b, ...)        CR_CHECK(true, (a) == (b), __VA_ARGS__)
#define cr_assert_neq(a, b, ...)       CR_CHECK(true, (a) != (b), __VA_ARGS__)
#define cr_assert_lt(a, b, ...)        CR_CHECK(true, (a) < (b), __VA_ARGS__)
#define cr_assert_leq(a, b, ...)       CR_CHECK(true, (a) <= (b), __VA_ARGS__)
#define cr_assert_gt(a, b, ...)        CR_CHECK(true, (a) > (b), __VA_ARGS__)
#define cr_assert_geq(a, b, ...)       CR_CHECK(true, (a) >= (b), __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...)    CR_CHECK(true, strcmp(a, b) == 0, __VA_ARGS__)
#define cr_assert_str_neq(a, b, ...)   CR_CHECK(true, strcmp(a, b) != 0, __VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...) CR_CHECK(true, memcmp(a, b, n) == 0, __VA_ARGS__)
#define cr_assert_float_eq(a, b, most, ...)                                                        \
    CR_CHECK(true, fabs((double)(a) - (double)(b)) <= (double)(most), __VA_ARGS__)
#define cr_expect(c, ...)              CR_CHECK(false, (bool)(c), __VA_ARGS__)
#define cr_expect_not(c, ...)          CR_CHECK(false, !(c), __VA_ARGS__)
#define cr_expect_null(p, ...)         CR_CHECK(false, (p) == NULL, __VA_ARGS__)
#define cr_expect_eq(a, b, ...)        CR_CHECK(false, (a) == (b), __VA_ARGS__)
#define cr_expect_neq(a, b, ...)       CR_CHECK(false, (a) != (b), __VA_ARGS__)
#define cr_expect_leq(a, b, ...)       CR_CHECK(false, (a) <= (b), __VA_ARGS__)
#define cr_expect_lt(a, b, ...)        CR_CHECK(false, (a) < (b), __VA_ARGS__)
#define cr_expect_gt(a, b, ...)        CR_CHECK(false, (a) > (b), __VA_ARGS__)
#define cr_expect_geq(a, b, ...)       CR_CHECK(false, (a) >= (b), __VA_ARGS__)
#define cr_expect_arr_eq(a, b, n, ...) CR_CHECK(false, memcmp(a, b, n) == 0, __VA_ARGS__)
#define cr_expect_str_eq(a, b, ...)    CR_CHECK(false, strcmp(a, b) == 0, __VA_ARGS__)
#define cr_expect_float_eq(a, b, most, ...)                                                        \
    CR_CHECK(false, fabs((double)(a) - (double)(b)) <= (double)(most), __VA_ARGS__)

#endif
