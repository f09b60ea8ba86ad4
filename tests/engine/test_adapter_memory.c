/* test_adapter_memory.c - adapters when memory runs out: every allocation of a load fails once,
 * and each time the load ends with an error and nothing is left behind. The C library does without
 * a few of its own: stdio then reads unbuffered, asprintf does not shrink its result. Such a load
 * must be whole.
 *
 * Under sanitizers the loads run without failures, for their checks of the rest. */
#include <criterion/criterion.h>

#include <stdlib.h>
#include <string.h>

#include "engine/adapter.h"
#include "tests/support/failing_alloc.h"
#include "tests/support/golden_models.h"

#define GOLDEN GN_SOURCE_DIR "/tests/golden/data/"

/* *hash is the adapter's, when it was loaded. */
static gn_status load(const char *dir, long nth, uint64_t hash[2]) {
    gn_adapter *adapter = NULL;
    gn_error err = {0};
    calls = live = 0;
    fail_at = nth;
    watching = true;
    const gn_status status = gn_adapter_load(&adapter, &golden_tiny, "tiny", dir, &err);
    if (adapter) memcpy(hash, adapter->hash, sizeof adapter->hash);
    gn_adapter_close(adapter);
    watching = false;
    cr_assert_eq(live, 0, "%s: %ld blocks are left when allocation %ld fails (%s)", dir, live, nth,
                 err.message);
    cr_assert_eq(status == GN_OK, adapter != NULL);
    cr_assert_eq(status, err.status, "%s: allocation %ld", dir, nth);
    return status;
}

Test(adapter_memory, every_allocation_fails_once) {
    static const char *const dirs[] = {GOLDEN "adapter-attn-r4", GOLDEN "adapter-all-r16-bin"};
    for (size_t i = 0; i < sizeof dirs / sizeof *dirs; i++) {
        uint64_t whole[2], hash[2];
        cr_assert_eq(load(dirs[i], 0, whole), GN_OK);
        const long total = calls;
        cr_assert(total > 50 || !CAN_FAIL, "%ld", total);
        long survived = 0;
        for (long nth = 1; nth <= total; nth++) {
            if (load(dirs[i], nth, hash) != GN_OK) continue;
            cr_assert_eq(memcmp(hash, whole, sizeof hash), 0, "%s: allocation %ld", dirs[i], nth);
            survived++;
        }
        /* stdio's one buffer, and asprintf's for the config and one or two weight files */
        cr_assert(survived <= 4, "%s: %ld of %ld failures went unnoticed", dirs[i], survived,
                  total);
    }
}
