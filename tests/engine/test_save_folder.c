/* test_save_folder.c - what may be replaced, and folders on the way. */
#include <criterion/criterion.h>
#include <string.h>

#include "engine/save_folder.h"
#include "tests/support/folder.h"

TestSuite(save_folder, .init = test_folder_make, .fini = test_folder_remove);

Test(save_folder, folders_above_are_made) {
    gn_error err = {0};
    cr_assert_eq(gn_folder_make(test_path("a/b/c"), &err), GN_OK, "%s", err.message);
    cr_assert_eq(gn_folder_make(test_path("a/b/c/"), &err), GN_OK, "%s", err.message);
    cr_assert(test_exists("a/b/c"));
    test_write_text("file", "text");
    cr_assert_eq(gn_folder_make(test_path("file/d"), &err), GN_EIO);
    cr_assert_eq(gn_folder_make("", &err), GN_EINVAL);
}

Test(save_folder, only_its_own_kind_is_replaced) {
    gn_error err = {0};
    const char *path = test_path("kind");
    cr_assert_eq(gn_save_folder_check(path, "kind.json", "kind", &err), GN_OK);
    cr_assert_eq(gn_folder_make(path, &err), GN_OK);
    cr_assert_eq(gn_save_folder_check(path, "kind.json", "kind", &err), GN_OK, "it is empty");
    cr_assert_eq(gn_folder_make(path, &err), GN_OK);
    test_write_text("kind/other.json", "{}");
    cr_assert_eq(gn_save_folder_check(path, "kind.json", "kind", &err), GN_EEXIST);
    cr_assert(strstr(err.message, "is no kind"), "%s", err.message);
    test_write_text("kind/kind.json", "{}");
    cr_assert_eq(gn_save_folder_check(path, "kind.json", "kind", &err), GN_OK);
    cr_assert(test_exists("kind/other.json"));
    test_write_text("file", "text");
    cr_assert_eq(gn_save_folder_check(test_path("file"), "kind.json", "kind", &err), GN_EEXIST);
}
