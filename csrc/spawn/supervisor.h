/*
 * The supervisor of one command: a process above it that ends the command, and with `all` everything that it has
 * started, when told to, when the command ends, and when the maker of the supervisor has gone.
 *
 *     helper ── guard ── supervisor ── command ── ...
 *
 * Guard and supervisor are subreapers: a process that loses its parent becomes a child of the supervisor, sessions and
 * double forks notwithstanding.  If the supervisor is killed, its children become the guard's; if the guard or the
 * helper is killed, PR_SET_PDEATHSIG tells the next one below (each of them has one thread only).  If both are killed at
 * once, a job's keeper, which is a subreaper too, ends the tree.  A helper is none: it could not tell the orphans of one
 * command from those of another.  Both share the memory of the helper, make raw system calls only, and have no
 * descriptors.
 */
#ifndef EB_SUPERVISOR_H
#define EB_SUPERVISOR_H

#include <stdbool.h>
#include <sys/resource.h>

#include "spawn/spawn_job.h"
#include "spawn/watch.h"

struct eb_supervisor {
    /* written by guard and supervisor */
    volatile pid_t guard_alive, alive; /* the kernel clears them when the memory is released */
    volatile pid_t command;            /* 0: it has not been made */
    volatile int has_closed;           /* their copies of descriptors; the command must hold the last ones */
    volatile int gate;                 /* enum of supervisor.c: whether the pid is still the command's */
    volatile int status;               /* of the command, once it has ended */
    struct rusage usage;
    struct rusage tree;           /* at the end, of all processes that have been waited for */
    volatile enum eb_cause cause; /* why the command has been ended */
    struct eb_watch *watch;       /* for its limits, or NULL */
    /* written by the helper */
    volatile uint64_t wanted; /* signals for the whole tree, bit n-1 for signal n */
    /* read by the others */
    pid_t maker, guard;
    bool all;          /* otherwise only the command is ended */
    uint32_t drain_ms; /* from the command's end until what is left of its tree is killed */
    struct eb_job *job;
    struct eb_supervisor *next; /* in the list of lingering ones */
};

/* Makes a guard, which makes a supervisor, which makes the command of `job`; `flags` are for the guard.  Returns the
 * guard, a child of the calling process, or -errno: ENOTSUP if /proc has no lists of children, or close_range(2) is
 * missing. */
pid_t eb_supervisor_start(struct eb_supervisor **made, struct eb_job *job, unsigned flags);
/* The next two are for a maker that is a subreaper, which gets the tree if guard and supervisor are both killed.
 * The first is for each process that the maker has waited for. */
void eb_supervisor_note(struct eb_supervisor *s, pid_t pid, int status, const struct rusage *usage);
/* Kills the rest of the tree, once the guard has been waited for; `again` if a first call did not suffice.  Returns
 * false if no process is left that it may kill. */
bool eb_supervisor_kill_rest(struct eb_supervisor *s, bool again);
/* The guard has been waited for. */
void eb_supervisor_free(struct eb_supervisor *s);

/* Whether the command has ended, and `status` and `usage` are set. */
bool eb_supervisor_knows_status(const struct eb_supervisor *s);
/* Sends a signal to the command, or with `group` to the process group of that number.  It never reaches another
 * process: once the command has been waited for, nothing is sent. */
void eb_supervisor_signal(struct eb_supervisor *s, bool group, int number);
/* Sends a signal to every process of the tree, of which SIGKILL leaves nothing; or without `all` to the command
 * alone. The guard must not have been waited for. */
void eb_supervisor_signal_all(struct eb_supervisor *s, int number);

#endif
