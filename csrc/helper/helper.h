/*
 * Shared by the parts of the helper: what this process is, what it serves, and their requests to its loop.
 *
 * Calls go one way: main -> loop -> frames -> control -> command -> streams -> connection; stdio, process and self are
 * shared with a job's keeper.  Only the loop has the epoll set,
 * closes what is watched, and frees connections and commands.  What another part wants of it, it leaves as a mark in
 * an object, or here, and the loop acts on that after it has returned.
 */
#ifndef EB_HELPER_H
#define EB_HELPER_H

#include <sys/socket.h>

#include "common/clock.h"
#include "helper/self.h"
#include "spawn/spawn.h"

/* What an epoll event points to: a member of an object, which leads to the object. */
enum eb_source {
    EB_SOURCE_CONNECTION,
    EB_SOURCE_START,
    EB_SOURCE_STDIN, /* three in a row */
    EB_SOURCE_STDOUT,
    EB_SOURCE_STDERR,
    EB_SOURCE_CALLER,
    EB_SOURCE_SIGNALS,
};

struct eb_helper {
    struct eb_self self;
    bool pool; /* one of a daemon's helpers, not a caller's own */
    bool owns_children;
    struct ucred caller; /* of a private helper: whom it serves */
    uint64_t frame_timeout_ms;
    uint64_t max_tasks; /* the server is told after so many starts; 0: it is not */
    const struct eb_spawner *spawner;
    int null_fd; /* /dev/null */

    struct eb_connection *control;     /* NULL: at its end */
    struct eb_connection *connections; /* those that are open */
    struct eb_command *commands;
    unsigned count;    /* connections but the control socket, and commands that have outlived theirs */
    unsigned starting; /* starts under way */
    bool draining;     /* takes no command any more */

    /* Marks for the loop. */
    struct eb_connection *marked, **marked_end; /* those with something to be done; first in, first out */
    uint64_t next_wake; /* of eb_now_ms: when some object needs a look, at the latest; 0: never */
    bool ends_groups;   /* a command's process group is to end with it, see eb_command_end_group */
    bool needs_trim;    /* several commands have been at work at once, and memory may be given back */
    bool full;          /* `max_tasks` have been started, and the server is to be told */
};

extern struct eb_helper helper;

/* Has the objects looked at then, or a few milliseconds later. */
void eb_wake_by(uint64_t when);

#endif
