/* Starts one command, with whichever system calls. */
#ifndef EB_SPAWN_H
#define EB_SPAWN_H

#include <sys/types.h>

struct eb_supervisor;

#include "spawn/request.h"
#include "common/state.h"

/* One start in progress, and then its outcome. */
struct eb_start {
    pid_t pid; /* 0 if no process was made */
    enum eb_owner owner;
    int done_fd;      /* hangs up when the outcome is known; -1: it is known at once, unless `polled` */
    bool polled;      /* only `is_decided` shows that the outcome is known */
    int error;        /* 0: the command runs */
    bool still_read;  /* what the request points to must stay: its process was orphaned before its exec */
    uint64_t exec_ns; /* of CLOCK_MONOTONIC: when a polled one called execve */
    enum eb_stage stage;
    uint8_t member; /* as FAILED has it */
    struct eb_supervisor
        *supervisor; /* its guard is `pid` until `end`; the caller frees it after waiting for the guard */
    void *job;       /* private to the implementation */
};

struct eb_spawner {
    /* Fills `start`.  Until `end`, `q` and what it points to must stay as they are.  The descriptors in its
     * `sources` are close-on-exec, none of them is 0, 1 or 2, and the new process has its own. `apart`: it must not
     * have copies of other descriptors even for a moment, because closing one may take for ever. */
    void (*begin)(struct eb_start *start, const struct eb_request *q, bool apart);
    /* Whether the outcome of a start that was not known at once is known now. */
    bool (*is_decided)(const struct eb_start *start);
    /* Called when the outcome is known: stores it, and releases what the start held. */
    void (*end)(struct eb_start *start);
    /* Frees what is kept for later starts, except the memory of a number of them. */
    void (*trim)(unsigned kept);
};

/* Linux: clone(2) without CLONE_VFORK, so that a slow exec holds up nothing.  With `parent`, new processes are
 * children of this process's parent (CLONE_PARENT) where the kernel allows that.  With `apart`, some starts may use
 * that, see `begin`: low descriptor numbers are reserved for it, so call this before clients send descriptors.  NULL
 * if it does not work on this machine's architecture.  `self` is this process's state, and must stay valid. */
const struct eb_spawner *eb_spawner_clone(const struct eb_state *self, bool parent, bool apart);
/* For any POSIX system: posix_spawn(3).  Requests that it can't express fail with ENOTSUP. */
const struct eb_spawner *eb_spawner_posix(const struct eb_state *self);

#endif
