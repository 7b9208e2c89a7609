/* Properties of this process, and those that its commands inherit. */
#ifndef EB_SELF_H
#define EB_SELF_H

#include "common/state.h"
#include "spawn/request.h"

struct eb_self {
    struct eb_state state;               /* as at its start, except for the raised limit of open files */
    uint64_t open_files;                 /* that limit at its start */
    bool raises_limits, raises_priority; /* whether it may exceed its own */
};

/* Ends the process with errno's message. */
_Noreturn void eb_fatal(const char *what);
/* Blocks all signals for good, and returns a signalfd of SIGCHLD, and with `ends` of SIGTERM. */
int eb_self_block_signals(bool ends);
/* Makes descriptors up to `last` close-on-exec, and closes all others. */
void eb_self_keep_descriptors(int last);
/* Fills `s`, whose `open_files` may have been set by an option, and raises the limit of open files, unless posix_spawn
 * starts commands. */
void eb_self_read(struct eb_self *s, bool posix);
/* Completes what a request of a daemon's client leaves open. */
void eb_self_complete(const struct eb_self *s, struct eb_request *q);

#endif
