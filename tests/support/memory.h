/* memory.h - for tests: what a process needed. */
#ifndef GN_TEST_MEMORY_H
#define GN_TEST_MEMORY_H

/* The most memory this process has had in RAM so far, mapped files included; KiB. */
long test_peak_memory(void);

#endif
