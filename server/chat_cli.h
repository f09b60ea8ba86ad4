/* chat_cli.h - `guanaco-server chat`: a chat in the terminal, over the same engine. */
#ifndef GN_CHAT_CLI_H
#define GN_CHAT_CLI_H

/* argv[0] is the command's name, "chat". Returns the program's exit status: 0, 1 after a failure,
 * 2 after a wrong command line. */
int gn_chat_cli_main(int argc, char **argv);

#endif
