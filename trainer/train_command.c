/* train_command.c - `guanaco-trainer train`. */
#include "trainer/train.h"

int gn_train_command(int n, char *const *args) {
    gn_train_options o;
    gn_error err = {0};
    int exit_status;
    if (gn_train_options_parse(&o, n, args, &exit_status)) {
        gn_communicator alone = gn_communicator_alone();
        exit_status = gn_train(&o, &alone, &err) ? gn_command_failed(&err) : 0;
    }
    gn_train_options_free(&o);
    return exit_status;
}
