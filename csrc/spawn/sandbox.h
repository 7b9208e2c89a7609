/* The walls around a command, put up by itself right before its exec. */
#ifndef EB_SANDBOX_H
#define EB_SANDBOX_H

#include "common/wire.h"

/* In the new process, which must have PR_SET_NO_NEW_PRIVS: has it keep to a ruleset of Landlock.  0 or -errno. */
long eb_restrict_files(int ruleset);

/* The same for the sockets that it makes; it has no io_uring, which makes sockets too, and no keyrings then. */
long eb_restrict_sockets(enum eb_sockets sockets);

#endif
