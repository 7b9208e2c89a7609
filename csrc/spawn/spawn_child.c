/*
 * What the new process does.  It shares its maker's memory until it execs or exits, and runs at the same time as its
 * maker, on a stack of its own.  So it makes raw system calls only, and writes only to its job and to the `sources` of
 * its request.
 */
#include "spawn/spawn_job.h"

#include "common/rawsys.h"
#include "spawn/child_capabilities.h"

#if EB_HAVE_RAW

#include "spawn/places.h"
#include "spawn/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { IOPRIO_WHO_PROCESS = 1 }; /* in linux/ioprio.h only since Linux 6.5 */

/* -- descriptors -- */

EB_BARE long eb_take_table(struct eb_job *job)
{
    return eb_raw(SYS_close_range, (long)job->highest + 1, ~0U, EB_CLOSE_RANGE_UNSHARE, 0);
}

EB_BARE long eb_tell_table(struct eb_job *job)
{
    int shares = EB_SHARED;
    if (!__atomic_compare_exchange_n(&job->shares_table, &shares, EB_OWN_TABLE, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
        return -EAGAIN;
    eb_raw(SYS_futex, (long)&job->shares_table, FUTEX_WAKE, 1, 0);
    return 0;
}

/* Copies `fd` to a number that is no target, from `*least` on. */
static EB_BARE long move_away(const struct eb_request *q, int fd, long *least)
{
    for (uint32_t i = 0; i <= q->target_count; i++) {
        long copy = eb_raw(SYS_fcntl, fd, F_DUPFD_CLOEXEC, *least, 0);
        if (copy < 0)
            return copy;
        *least = copy + 1;
        if (!eb_is_target(q, copy))
            return copy;
        eb_raw(SYS_close, copy, 0, 0, 0);
    }
    return -EMFILE;
}

static EB_BARE long place_fds(struct eb_job *job)
{
    const struct eb_request *q = job->q;
    uint32_t count = eb_request_sources(q);
    long r, least = 3;
    if (job->pipe >= 0 && eb_is_target(q, job->pipe)) {
        if ((r = move_away(q, job->pipe, &least)) < 0)
            return r;
        job->pipe = (int)r;
    }
    for (uint32_t i = 0; i < count; i++) {
        bool in_place = i < q->target_count && q->sources[i] == q->targets[i];
        if (!in_place && eb_is_target(q, q->sources[i])) {
            if ((r = move_away(q, q->sources[i], &least)) < 0)
                return r;
            q->sources[i] = (int)r;
        } else if (i >= q->target_count && !job->keeps_files) {
            /* The program must not get a descriptor that a tag carries, even if it is inheritable in the caller. */
            if ((r = eb_raw(SYS_fcntl, q->sources[i], F_SETFD, FD_CLOEXEC, 0)) < 0)
                return r;
        }
    }
    for (uint32_t i = 0; i < q->target_count; i++) {
        if (q->sources[i] == q->targets[i])
            r = eb_raw(SYS_fcntl, q->sources[i], F_SETFD, 0, 0);
        else
            r = eb_raw(SYS_dup3, q->sources[i], q->targets[i], 0, 0);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Closes all descriptors that are not needed up to the exec, because a slow exec would keep copies of others' pipes
 * and connections open.  On an older kernel only the exec closes them.  Returns 0 or -errno. */
static EB_BARE long close_rest(const struct eb_job *job)
{
    const struct eb_request *q = job->q;
    const uint32_t count = eb_request_sources(q);
    long next = 0, r = 0;
    for (uint32_t i = 0; r == 0;) {
        long kept = -1;
        while (i < q->target_count && q->targets[i] < next)
            i++;
        if (i < q->target_count)
            kept = q->targets[i];
        if (job->pipe >= next && (kept < 0 || job->pipe < kept))
            kept = job->pipe;
        for (uint32_t k = q->target_count; k < count; k++)
            if (q->sources[k] >= next && (kept < 0 || q->sources[k] < kept))
                kept = q->sources[k];
        if (kept != next)
            r = eb_raw(SYS_close_range, next, kept < 0 ? ~0U : (unsigned)kept - 1, 0, 0);
        if (kept < 0)
            break;
        next = kept + 1;
    }
    return r;
}

/* Its user may trace it from here on, and its files in /proc belong to that user.  So it must have none of its maker's
 * descriptors left. */
static EB_BARE long open_to_user(const struct eb_job *job)
{
    long r = close_rest(job);
    return r < 0 ? r : eb_raw5(SYS_prctl, PR_SET_DUMPABLE, 1, 0, 0, 0);
}

/* -- signals -- */

EB_BARE long eb_set_action(int n, bool ignored)
{
    struct eb_action action = {.handler = ignored ? 1 : 0}; /* SIG_IGN : SIG_DFL */
    return eb_raw(SYS_rt_sigaction, n, (long)&action, 0, sizeof action.mask);
}

/* There are no handlers here, only SIG_IGN and SIG_DFL. */
static EB_BARE long set_signals(const struct eb_state *self, const struct eb_request *q)
{
    uint64_t differ = q->sigign; /* the signals of SIGNALS_IGNORED alone */
    if (eb_has(q, EB_TAG_SIGIGN))
        differ = self != NULL ? q->sigign ^ self->sigign : ~EB_NEVER_IGNORED;
    differ |= q->sigdefault;
    for (int n = 1; n <= EB_SIGNALS; n++)
        if (differ >> (n - 1) & 1) {
            long r = eb_set_action(n, ((q->sigign & ~q->sigdefault) >> (n - 1) & 1) != 0);
            if (r < 0)
                return r;
        }
    return 0;
}

/* Takes the place of a core dump.  SIGKILL does not affect others that share the memory. */
static EB_BARE void end_at_once(int n)
{
    (void)n;
    eb_raw(SYS_kill, eb_raw(SYS_getpid, 0, 0, 0, 0), SIGKILL, 0, 0);
    eb_raw(SYS_exit_group, 255, 0, 0, 0); /* the first process of a PID namespace cannot kill itself */
}

/* Some kernels end all processes that share dumped memory, our maker included.  So no signal dumps core until the
 * exec, which resets this.  All signals are blocked. */
static EB_BARE long prevent_dumps(void)
{
    static const uint8_t dumping[] = {SIGQUIT, SIGILL,  SIGTRAP, SIGABRT, SIGBUS,
                                      SIGFPE,  SIGSEGV, SIGXCPU, SIGXFSZ, SIGSYS};
    const uint64_t with_restorer = 0x04000000; /* x86-64 runs no handler without it; this one never returns */
    for (uint32_t i = 0; i < sizeof dumping; i++) {
        const uint64_t handler = (uintptr_t)end_at_once;
        struct eb_action action = {.handler = handler, .flags = with_restorer, .restorer = handler}, before;
        long r = eb_raw(SYS_rt_sigaction, dumping[i], (long)&action, (long)&before, sizeof action.mask);
        if (r == 0 && before.handler == 1) /* SIG_IGN, which is inherited */
            r = eb_set_action(dumping[i], true);
        if (r < 0)
            return r;
    }
    return 0;
}

/* -- the terminal -- */

/* This can't stop the process, because SIGTTOU is blocked here, as all signals are. */
static EB_BARE long take_foreground(const struct eb_request *q)
{
    bool given = eb_has(q, EB_TAG_CONTROLLING_TERMINAL);
    long group = eb_raw(SYS_getpgid, 0, 0, 0, 0), fd;
    if (group < 0)
        return group;
    if (given)
        fd = eb_carried(q, EB_TAG_CONTROLLING_TERMINAL);
    else if ((fd = eb_raw(SYS_openat, AT_FDCWD, (long)"/dev/tty", O_RDWR | O_CLOEXEC, 0)) < 0)
        return fd;
    pid_t number = (pid_t)group;
    long r = eb_raw(SYS_ioctl, fd, TIOCSPGRP, (long)&number, 0);
    if (!given)
        eb_raw(SYS_close, fd, 0, 0, 0);
    return r;
}

/* -- limits and scheduling -- */

/* This affects all processes that share the memory, unless this one was made with CLONE_VFORK: see spawn_job.c. */
static EB_BARE long set_oom_score_adj(int value)
{
    char text[8];
    int at = sizeof text;
    unsigned left = value < 0 ? 0U - (unsigned)value : (unsigned)value;
    for (; at > 1 && (left > 0 || at == sizeof text); left /= 10)
        text[--at] = (char)('0' + left % 10);
    if (value < 0)
        text[--at] = '-';
    long fd = eb_raw(SYS_openat, AT_FDCWD, (long)"/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return fd;
    long r = eb_raw(SYS_write, fd, (long)&text[at], (long)sizeof text - at, 0);
    eb_raw(SYS_close, fd, 0, 0, 0);
    return r;
}

static EB_BARE long set_rlimits(struct eb_job *job)
{
    const struct eb_request *q = job->q;
    for (int i = 0; i < EB_MAX_RLIMITS; i++) {
        if (!eb_limits(q, i))
            continue;
        const struct rlimit *own = i == RLIMIT_NPROC ? &job->nproc : &job->self->rlimits[i];
        if (job->self == NULL || !eb_same_limit(&q->rlimits[i], own)) {
            job->member = (uint8_t)i;
            long r = eb_raw(SYS_prlimit64, 0, i, (long)&q->rlimits[i], 0);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

static EB_BARE long set_nice(const struct eb_state *self, const struct eb_request *q)
{
    long nice = q->nice;
    if (!eb_has(q, EB_TAG_NICE)) {
        if ((nice = eb_raw(SYS_getpriority, PRIO_PROCESS, 0, 0, 0)) < 0)
            return nice;
        nice = 20 - nice; /* the raw system call returns 20 - nice, because its results can't be negative */
    }
    nice += q->renice;
    if (self != NULL && nice == self->nice)
        return 0;
    return eb_raw(SYS_setpriority, PRIO_PROCESS, 0, nice, 0);
}

static EB_BARE long set_scheduler(const struct eb_request *q)
{
    const struct {
        int priority;
    } parameters = {.priority = (int)q->priority};
    return eb_raw(SYS_sched_setscheduler, 0, (long)q->policy, (long)&parameters, 0);
}

static EB_BARE bool same_affinity(const struct eb_state *self, const struct eb_request *q)
{
    if (self == NULL || q->affinity_size != self->affinity_size)
        return false;
    for (uint32_t i = 0; i < q->affinity_size; i++)
        if (q->affinity[i] != self->affinity[i])
            return false;
    return true;
}

/* -- the exec -- */

/* Returns the first error, as execvp(3) does: ENOENT or ENOTDIR only if there was no other. */
static EB_BARE long exec_first(const struct eb_request *q)
{
    extern char **environ;
    char **env = q->env != NULL ? q->env : environ;
    long first = 0, r = -ENOENT;
    for (char **path = q->executables; *path != NULL; path++) {
        r = eb_raw(SYS_execve, (long)*path, (long)q->argv, (long)env, 0);
        if (r != -ENOENT && r != -ENOTDIR && first == 0)
            first = r;
    }
    return first != 0 ? first : r;
}

static EB_BARE uint64_t now_ns(void)
{
    struct timespec t = {0};
    eb_raw(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, 0, 0);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

EB_BARE int eb_child(void *arg)
{
    struct eb_job *job = arg;
    const struct eb_request *q = job->q;
    const struct eb_state *self = job->self;
    long r;
#define STEP(name, call)              \
    do {                              \
        job->stage = EB_STAGE_##name; \
        job->member = 0;              \
        if ((r = (call)) < 0)         \
            goto failed;              \
    } while (0)

    if (job->by_thread) /* `made` says so */
        eb_raw(SYS_futex, (long)&job->made, FUTEX_WAKE, 1, 0);
    if (job->first != NULL)
        STEP(START, job->first(job));
    STEP(FDS, place_fds(job));
    if (job->own_memory)
        STEP(FDS, open_to_user(job));
    else if (!job->keeps_files)
        (void)close_rest(job);
    if (q->namespaces & EB_NEW_USER)
        STEP(NAMESPACES, eb_map_ids(job->user, job->group));
    if (job->joins_cgroup)
        STEP(CGROUP, eb_join_cgroup(eb_carried(q, EB_TAG_CGROUP)));
    if (eb_has(q, EB_TAG_CWD_FD))
        STEP(CWD, eb_raw(SYS_fchdir, eb_carried(q, EB_TAG_CWD_FD), 0, 0, 0));
    if (eb_has(q, EB_TAG_CWD) && !eb_has(q, EB_TAG_ROOT))
        STEP(CWD, eb_raw(SYS_chdir, (long)q->cwd, 0, 0, 0));
    if (eb_has(q, EB_TAG_UMASK))
        STEP(UMASK, eb_raw(SYS_umask, (long)q->umask, 0, 0, 0));
    STEP(SIGNALS, set_signals(self, q));
    if (eb_has(q, EB_TAG_SETSID))
        STEP(SETSID, eb_raw(SYS_setsid, 0, 0, 0, 0));
    /* If its own group is of another pid namespace, a helper sees 0 as the group's number. */
    if (eb_has(q, EB_TAG_PGROUP) && (self == NULL || q->pgroup == 0 || q->pgroup != self->pgrp ||
                                     job->supervisor != NULL || eb_has(q, EB_TAG_SETSID)))
        STEP(PGROUP, eb_raw(SYS_setpgid, 0, q->pgroup, 0, 0));
    else if (!eb_has(q, EB_TAG_PGROUP) && !eb_has(q, EB_TAG_SETSID) && job->supervisor != NULL)
        STEP(PGROUP, eb_raw(SYS_setpgid, 0, 0, 0, 0)); /* leave the supervisor's group */
    if (eb_has(q, EB_TAG_CONTROLLING_TERMINAL))
        STEP(CONTROLLING_TERMINAL, eb_raw(SYS_ioctl, eb_carried(q, EB_TAG_CONTROLLING_TERMINAL), TIOCSCTTY, 0, 0));
    if (eb_has(q, EB_TAG_TERMINAL))
        STEP(CONTROLLING_TERMINAL, eb_raw(SYS_ioctl, 0, TIOCSCTTY, 0, 0));
    if (eb_has(q, EB_TAG_FOREGROUND))
        STEP(FOREGROUND, take_foreground(q));
    if (eb_has(q, EB_TAG_OOM_SCORE_ADJ)) /* before files are limited, and while /proc is there */
        STEP(OOM_SCORE_ADJ, set_oom_score_adj(q->oom_score_adj));
    STEP(RLIMITS, set_rlimits(job));
    if (eb_has(q, EB_TAG_NICE) || eb_has(q, EB_TAG_RENICE))
        STEP(NICE, set_nice(self, q));
    if (eb_has(q, EB_TAG_AFFINITY) && !same_affinity(self, q))
        STEP(AFFINITY, eb_raw(SYS_sched_setaffinity, 0, q->affinity_size, (long)q->affinity, 0));
    if (eb_has(q, EB_TAG_SCHEDULER))
        STEP(SCHEDULER, set_scheduler(q));
    if (eb_has(q, EB_TAG_IONICE))
        STEP(IONICE, eb_raw(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, (long)q->ionice, 0));
    if (eb_has(q, EB_TAG_TIMER_SLACK))
        STEP(TIMER_SLACK, eb_raw5(SYS_prctl, PR_SET_TIMERSLACK, (long)q->timer_slack, 0, 0, 0));
    if (eb_has(q, EB_TAG_ROOT)) {
        STEP(ROOT, eb_raw(SYS_chroot, (long)q->root, 0, 0, 0));
        STEP(CWD, eb_raw(SYS_chdir, (long)"/", 0, 0, 0));
        if (eb_has(q, EB_TAG_CWD))
            STEP(CWD, eb_raw(SYS_chdir, (long)q->cwd, 0, 0, 0));
    }
    if (eb_has(q, EB_TAG_CAPABILITIES)) /* while the process may do so */
        STEP(CAPABILITIES, eb_bound_capabilities(job));
    if (eb_has(q, EB_TAG_GROUPS))
        STEP(GROUPS, eb_raw(SYS_setgroups, q->group_count, (long)q->groups, 0, 0));
    if (eb_has(q, EB_TAG_GID))
        STEP(GID, eb_raw(SYS_setresgid, q->gid, q->gid, q->gid, 0));
    if (eb_has(q, EB_TAG_UID))
        STEP(UID, eb_raw(SYS_setresuid, q->uid, q->uid, q->uid, 0));
    if (eb_has(q, EB_TAG_CAPABILITIES))
        STEP(CAPABILITIES, eb_set_capabilities(job));
    if (eb_has(q, EB_TAG_NO_NEW_PRIVS) || eb_has(q, EB_TAG_SANDBOX) || eb_has(q, EB_TAG_SOCKETS))
        STEP(NO_NEW_PRIVS, eb_raw5(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    if (eb_has(q, EB_TAG_SANDBOX))
        STEP(SANDBOX, eb_restrict_files(eb_carried(q, EB_TAG_SANDBOX)));
    if (eb_has(q, EB_TAG_SOCKETS))
        STEP(SANDBOX, eb_restrict_sockets(q->sockets));
    if (job->prevents_dumps)
        STEP(SIGNALS, prevent_dumps());
    if (eb_has(q, EB_TAG_SIGMASK))
        STEP(SIGNALS, eb_raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&q->sigmask, 0, sizeof q->sigmask));
    if (job->timed)
        job->exec_ns = now_ns();
    STEP(EXEC, exec_first(q));
#undef STEP
failed:
    job->error = (int)-r;
    if (job->own_memory) {
        const struct eb_failure failure = {job->error, (uint8_t)job->stage, job->member};
        eb_raw(SYS_write, job->pipe, (long)&failure, sizeof failure, 0);
    }
    eb_raw(SYS_exit_group, 255, 0, 0, 0);
    return 255;
}

#endif
