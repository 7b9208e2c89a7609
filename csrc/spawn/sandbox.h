/* The sandbox of a command, which the new process enters by itself right before its exec. */
#ifndef EB_SANDBOX_H
#define EB_SANDBOX_H

#include "common/wire.h"

/* In the new process, which must have PR_SET_NO_NEW_PRIVS: applies a ruleset of Landlock.  Returns 0 or -errno. */
long eb_restrict_files(int ruleset);

/* The same for sockets.  It also forbids to type on a terminal by ioctl, and unless any sockets may be made io_uring, which
 * makes sockets too, and keyrings. */
long eb_restrict_sockets(enum eb_sockets sockets);

#endif
