/* A new process between clone and exec, on Linux: the memory that it reads and writes, and its stack. */
#ifndef EB_SPAWN_JOB_H
#define EB_SPAWN_JOB_H

#include <stdbool.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "spawn/request.h"
#include "spawn/spawn.h"
#include "common/state.h"

enum { EB_CLOSE_RANGE_UNSHARE = 1 << 1 };

/* Values of `shares_table`; EB_LATE: its maker has waited too long, and the process must end. */
enum { EB_OWN_TABLE, EB_SHARED, EB_LATE };

/* SIGKILL and SIGSTOP. */
#define EB_NEVER_IGNORED ((uint64_t)1 << 8 | (uint64_t)1 << 18)

struct eb_supervisor;

/* Sent through the pipe. */
struct eb_failure {
    int32_t error;
    uint8_t stage, member;
};

struct eb_job {
    /* written by the new process */
    volatile int error;
    volatile enum eb_stage stage;
    volatile uint8_t member;   /* the current part of what the stage sets */
    volatile pid_t alive;      /* not 0 while it uses its maker's memory; the kernel clears it, and wakes those who wait
                                  */
    volatile int shares_table; /* EB_SHARED while it also uses its maker's table of descriptors, or a name in it */
    volatile pid_t made;       /* set by a thread: its pid, or -errno if there is none; 0: not yet */
    volatile bool cannot_reopen;
    int reopened_fd;
    volatile uint64_t exec_ns; /* of CLOCK_MONOTONIC: when it called execve, if it is `timed` */
    /* read by it */
    const struct eb_request *q;
    const struct eb_state *self; /* its maker's state, which need not be set again; NULL if it is not known */
    struct rlimit nproc;         /* in place of the one in `self` */
    int pipe;                    /* close-on-exec; -1: none */
    int highest;                 /* the highest descriptor that it takes over from a shared table */
    uint8_t reopened;            /* bit n: it reopens the descriptor for n, a pipe, by its name in /proc */
    char proc_fd[24];            /* its maker's directory in /proc */
    bool has_handlers;           /* its maker's signal handlers are still there */
    bool keeps_files;            /* it closes nothing */
    bool timed;
    bool joins_cgroup; /* it could not start in the cgroup, and joins it by itself */
    uid_t user;        /* its maker's, if it starts in a new user namespace */
    gid_t group;
    bool prevents_dumps;
    bool by_thread;                    /* see spawn_job.c */
    bool own_memory;                   /* it gets a copy of its maker's memory, and its pipe tells why it failed */
    struct eb_supervisor *supervisor;  /* above it, or NULL */
    long (*first)(struct eb_job *job); /* called before all else, or NULL; returns 0 or -errno */
    /* the maker's */
    struct eb_job *next;
    uint64_t flags;
};

/* Memory for a job and the stack below it, or NULL. */
struct eb_job *eb_job_map(void);
void eb_job_unmap(struct eb_job *job);

/* Makes a process that runs eb_child; resets its handlers if `has_handlers` says that there are some.
 * `flags` go with CLONE_VM and CLONE_CHILD_CLEARTID.  Returns its pid or -errno. */
pid_t eb_job_clone(struct eb_job *job, unsigned flags);

/* The stage to which an error of eb_job_clone belongs. */
enum eb_stage eb_job_clone_stage(const struct eb_job *job, int error);
/* Waits until the process `pid` has its own table of descriptors, or has released the memory, so that the kernel has
 * cleared `alive`.  That takes microseconds.  If the process has been stopped, it is killed after 5 seconds, because
 * it would otherwise get other descriptors with these numbers, and its start fails with EAGAIN. */
void eb_job_await_table(struct eb_job *job, const volatile pid_t *alive, pid_t pid);

/* The new process. */
int eb_child(void *job);

/* In the new process: takes its own table, into which the kernel copies only the descriptors up to the job's
 * `highest`. When nothing in the maker's table is needed any more, tells the maker.  Returns 0 or -errno. */
long eb_take_table(struct eb_job *job);
long eb_tell_table(struct eb_job *job);

/* The kernel's sigaction. */
struct eb_action {
    uint64_t handler, flags, restorer, mask;
};

/* In the new process: ignores a signal, or gives it its default action.  Returns 0 or -errno. */
long eb_set_action(int n, bool ignored);

#endif
