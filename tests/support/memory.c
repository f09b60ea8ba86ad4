/* memory.c - what a process needed. */
#include "tests/support/memory.h"

#include <criterion/criterion.h>
#include <stdio.h>

long test_peak_memory(void) {
    char line[256];
    long peak = 0;
    FILE *status = fopen("/proc/self/status", "r");
    cr_assert(status);
    while (fgets(line, sizeof line, status) && sscanf(line, "VmHWM: %ld", &peak) != 1) continue;
    fclose(status);
    cr_assert_gt(peak, 0);
    return peak;
}
