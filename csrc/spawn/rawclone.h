/* clone(2) and clone3(2) without the C library: since 1.2.6, musl's clone() refuses CLONE_CHILD_CLEARTID. */
#ifndef EB_RAWCLONE_H
#define EB_RAWCLONE_H

#include "common/rawsys.h"

/* The argument of clone3(2).  A kernel accepts members that it does not know if they are 0. */
struct eb_clone_args {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
    uint64_t set_tid, set_tid_size, cgroup;
};

#if EB_HAVE_RAW

/* The new process calls `child` with `arg` on the given stack, and must not return from it.  `stack` is its upper end;
 * `parent_tid` for CLONE_PARENT_SETTID, `tid` for CLONE_CHILD_CLEARTID.  Both return the pid or -errno. */
long eb_raw_clone3(struct eb_clone_args *args, int (*child)(void *), void *arg);
long eb_raw_clone(unsigned long flags, void *stack, volatile pid_t *parent_tid, volatile pid_t *tid,
                  int (*child)(void *), void *arg);

#endif

#endif
