/*
 * Shared by the parts of the helper: what this process is, what it serves, and requests to its loop.
 *
 * Calls go one way: main -> loop -> frames -> control -> command -> queue, streams -> connection; stdio, process and
 * self are shared with a job's keeper.  Only the loop has the epoll set, closes watched descriptors, and frees
 * connections and commands.  A part that wants any of this leaves a mark in an object, or here, and the loop acts on
 * the mark after that part has returned.
 */
#ifndef EB_HELPER_H
#define EB_HELPER_H

#include <sys/socket.h>

#include "common/clock.h"
#include "owner/self.h"
#include "spawn/spawn.h"

/* An epoll event points to a member of this type, which leads to the object that contains it. */
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
    bool pool; /* a daemon's helper, not a private one */
    bool owns_children;
    struct ucred caller; /* whom a private helper serves */
    uint64_t frame_timeout_ms;
    uint64_t max_tasks; /* the server is told after this many starts; 0: never */
    const struct eb_spawner *spawner;
    int null_fd; /* /dev/null */

    struct eb_connection *control;     /* NULL: it has ended */
    struct eb_connection *connections; /* all open ones */
    struct eb_command *commands;
    unsigned count;    /* connections without the control socket, and commands that have outlived theirs */
    unsigned starting; /* starts under way */
    bool draining;     /* takes no more commands */

    /* Marks for the loop. */
    struct eb_connection *marked, **marked_end; /* connections with something to do; first in, first out */
    uint64_t next_wake;                         /* of eb_now_ms: the latest time to check on some object; 0: none */
    bool ends_groups; /* some command's process group must end with it, see eb_command_end_group */
    bool needs_trim;  /* several commands have been active at once, so memory may be given back */
    bool full;        /* `max_tasks` have been started, and the server is to be told */
};

extern struct eb_helper helper;

/* Has the loop check on the objects then, or a few milliseconds later. */
void eb_wake_by(uint64_t when);

#endif
