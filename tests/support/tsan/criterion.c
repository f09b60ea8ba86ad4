/* criterion.c - runs the tests; see criterion/criterion.h beside it. */
#include <criterion/criterion.h>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static cr_test *tests;
static bool failed; /* the test that this process runs */

void cr_register(cr_test *test) {
    test->next = tests;
    tests = test;
}

static void say(const char *fmt, va_list args) {
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
}

void cr_check(bool passed, bool final, const char *file, int line, const char *what,
              const char *fmt, ...) {
    if (passed) return;
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "%s:%d: %s:", file, line, what);
    say(fmt, args);
    va_end(args);
    failed = true;
    if (final) exit(EXIT_FAILURE);
}

void cr_log_info(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    say(fmt, args);
    va_end(args);
}

void cr_skip_test(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    say(fmt, args);
    va_end(args);
    exit(EXIT_SUCCESS);
}

static cr_options suite_of(const cr_test *test) {
    for (const cr_test *t = tests; t; t = t->next) {
        if (!t->run && strcmp(t->suite, test->suite) == 0) return t->options;
    }
    return (cr_options){0};
}

static void run(const cr_test *test) {
    const cr_options suite = suite_of(test);
    if (suite.init) suite.init();
    test->run();
    if (suite.fini) suite.fini();
    exit(failed ? EXIT_FAILURE : EXIT_SUCCESS);
}

static bool passes(const cr_test *test) {
    int status = 0;
    const time_t start = time(NULL);
    const pid_t child = fork();
    if (child == 0) run(test);
    const bool passed = child > 0 && waitpid(child, &status, 0) == child && status == 0;
    fprintf(stderr, "[%s] %s::%s: status %#x, %lld s\n", passed ? "PASS" : "FAIL", test->suite,
            test->name, (unsigned)status, (long long)(time(NULL) - start));
    return passed;
}

int main(void) {
    int n = 0, n_passed = 0;
    for (const cr_test *test = tests; test; test = test->next) {
        if (!test->run) continue;
        n++;
        n_passed += passes(test);
    }
    fprintf(stderr, "%d of %d tests passed\n", n_passed, n);
    return n > 0 && n == n_passed ? EXIT_SUCCESS : EXIT_FAILURE;
}
