/*
 * Only the parent of a process can be sure that a pid still belongs to it.  So the supervisor kills only its own
 * children, whose children then become its own.  It goes on until wait says ECHILD.
 */
#include "spawn/supervisor.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include "spawn/proctree.h"
#include "spawn/rawclone.h"
#include "spawn/slices.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const unsigned long PROCESS = CLONE_VM | CLONE_CHILD_CLEARTID | SIGCHLD;

/* Values of `gate`.  BUSY: the helper is about to signal the command; CLOSED: the helper may no longer do so, because the
 * command is about to be waited for; KNOWN: besides, `status` and `usage` are set. */
enum { LIVE, BUSY, CLOSED, KNOWN };

enum { CORE_DUMPED = 0x80 }; /* of a status: WCOREFLAG, which musl does not define */

enum {
    GUARD_PAGES = 64 << 10, /* at least a page, whatever its size; below each stack */
    GUARD_STACK = 64 << 10, /* of each stack; two pages of it stay resident */
    REAPS_PER_TURN = 256,   /* before those that are left are killed again */
    TICK_NS = 20 * 1000000, /* between checks of processes that do not end at once */
    PATIENCE_MS = 30,
    MOST_SPINS = 1000,
};

/* -- the helper's side -- */

static struct eb_supervisor *lingering; /* objects whose supervisor has outlived the guard */

static const size_t MAPPING = 2 * (GUARD_PAGES + GUARD_STACK);

static char *memory_of(struct eb_supervisor *s)
{
    uintptr_t top = ((uintptr_t)s + sizeof *s + 4095) & ~(uintptr_t)4095;
    return (char *)top - MAPPING;
}

/* Maps two stacks, with the object above the upper one. */
static struct eb_supervisor *map(void)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK;
    char *memory = mmap(NULL, MAPPING, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    if (mprotect(memory, GUARD_PAGES, PROT_NONE) != 0 || mprotect(memory + MAPPING / 2, GUARD_PAGES, PROT_NONE) != 0) {
        munmap(memory, MAPPING);
        return NULL;
    }
    return (struct eb_supervisor *)(((uintptr_t)memory + MAPPING - sizeof(struct eb_supervisor)) & ~(uintptr_t)63);
}

static bool in_use(const struct eb_supervisor *s)
{
    return __atomic_load_n(&s->guard_alive, __ATOMIC_ACQUIRE) != 0 || __atomic_load_n(&s->alive, __ATOMIC_ACQUIRE) != 0;
}

void eb_supervisor_free(struct eb_supervisor *s)
{
    s->next = lingering;
    lingering = s;
    for (struct eb_supervisor **at = &lingering, *one; (one = *at) != NULL;)
        if (in_use(one)) {
            at = &one->next;
        } else {
            *at = one->next;
            if (one->watch != NULL)
                munmap(one->watch, sizeof *one->watch);
            munmap(memory_of(one), MAPPING);
        }
}

EB_BARE bool eb_supervisor_knows_status(const struct eb_supervisor *s)
{
    return __atomic_load_n(&s->gate, __ATOMIC_ACQUIRE) == KNOWN;
}

void eb_supervisor_signal(struct eb_supervisor *s, bool group, int number)
{
    int live = LIVE;
    pid_t pid = s->command;
    if (pid == 0 || !__atomic_compare_exchange_n(&s->gate, &live, BUSY, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return;
    (void)kill(group ? -pid : pid, number);
    int busy = BUSY; /* unless the supervisor has stopped waiting for this */
    (void)__atomic_compare_exchange_n(&s->gate, &busy, LIVE, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

void eb_supervisor_signal_all(struct eb_supervisor *s, int number)
{
    if (number <= 0 || number > 64)
        return;
    __atomic_or_fetch(&s->wanted, (uint64_t)1 << (number - 1), __ATOMIC_RELEASE);
    (void)kill(s->guard, SIGTERM);
}

/* -- the processes -- */

struct siginfo_raw {
    int signo, error, code, padding;
    int pid, uid, status; /* of SIGCHLD */
    char rest[128 - 7 * sizeof(int)];
};

/* The helper must have finished signalling the command before the supervisor waits for it.  That takes a
 * microsecond, unless the helper has just been killed, or needs this process's CPU, which its scheduling policy
 * never yields. */
static EB_BARE void close_gate(struct eb_supervisor *s)
{
    const struct timespec pause = {.tv_nsec = 20 * 1000};
    for (int i = 0; i < MOST_SPINS; i++) {
        int live = LIVE;
        if (__atomic_compare_exchange_n(&s->gate, &live, CLOSED, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) ||
            live >= CLOSED)
            return;
        eb_raw(SYS_nanosleep, (long)&pause, 0, 0, 0);
    }
}

EB_BARE void eb_supervisor_note(struct eb_supervisor *s, pid_t pid, int status, const struct rusage *usage)
{
    if (pid != s->command)
        return;
    s->usage = *usage;
    s->status = status;
    __atomic_store_n(&s->gate, KNOWN, __ATOMIC_RELEASE);
}

/* The status in the form that wait4 returns. */
static EB_BARE int status_of(const struct siginfo_raw *info)
{
    return info->code == CLD_EXITED ? (info->status & 0xff) << 8
                                    : info->status | (info->code == CLD_DUMPED ? CORE_DUMPED : 0);
}

/* Waits for children that have ended.  Returns 1 if there may be more, 0 if the others live, or -ECHILD.  Sets
 * `*child` to 0 if it was one of them. */
static EB_BARE long reap(struct eb_supervisor *s, pid_t *child)
{
    for (int i = 0; i < REAPS_PER_TURN; i++) {
        struct siginfo_raw info;
        struct rusage usage;
        info.pid = 0;
        long r = eb_raw5(SYS_waitid, P_ALL, 0, (long)&info, WEXITED | WNOHANG | WNOWAIT, (long)&usage);
        if (r < 0)
            return r;
        if (info.pid == 0)
            return 0;
        pid_t pid = info.pid;
        if (pid == s->command) {
            close_gate(s);
            /* Before the command is waited for: a process that is killed right after that would take the status
             * with it. */
            eb_supervisor_note(s, pid, status_of(&info), &usage);
        }
        eb_raw(SYS_wait4, pid, 0, 0, 0);
        if (pid == *child)
            *child = 0;
    }
    return 1;
}

static EB_BARE int64_t now_ms(void)
{
    struct timespec t = {0};
    eb_raw(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, 0, 0);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Waits until a child ends or there is something to do, for at most `ns` if that is not negative. */
static EB_BARE void pause_ns(int64_t ns)
{
    const uint64_t taken = (uint64_t)1 << (SIGCHLD - 1) | (uint64_t)1 << (SIGTERM - 1);
    struct timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    eb_raw(SYS_rt_sigtimedwait, (long)&taken, 0, ns < 0 ? 0 : (long)&t, sizeof taken);
}

/* Passes on the helper's signals.  Returns whether everything is to end. */
static EB_BARE bool take_wanted(struct eb_supervisor *s, pid_t child, bool guards)
{
    uint64_t wanted = __atomic_load_n(&s->wanted, __ATOMIC_ACQUIRE);
    if (wanted == 0)
        return false;
    if (guards && child != 0) {
        eb_raw(SYS_kill, child, SIGTERM, 0, 0); /* it takes them */
        return false;
    }
    wanted = __atomic_exchange_n(&s->wanted, 0, __ATOMIC_ACQ_REL);
    const uint64_t kill = (uint64_t)1 << (SIGKILL - 1);
    for (int n = 1; n <= EB_SIGNALS; n++)
        if (!((wanted & ~kill) >> (n - 1) & 1))
            continue;
        else if (s->all)
            eb_tree_signal(n);
        else if (child != 0) /* not yet waited for */
            eb_raw(SYS_kill, child, n, 0, 0);
    return (wanted & kill) != 0;
}

static EB_BARE bool end(const struct eb_supervisor *s, pid_t child, bool guards, bool again)
{
    if (s->all)
        return eb_tree_kill(again);
    eb_raw(SYS_kill, guards && child != 0 ? child : s->command, SIGKILL, 0, 0);
    return true;
}

/* Gives this process precedence over all others, if it may: the more a tree has forked, the less CPU is left for the
 * process that ends it. */
static EB_BARE void hurry(void)
{
    const int priority = 1; /* struct sched_param */
    eb_raw(SYS_sched_setscheduler, 0, SCHED_FIFO, (long)&priority, 0);
}

/* Runs as long as there is any child.  `guards`: the child is the supervisor. */
static EB_BARE void supervise(struct eb_supervisor *s, pid_t parent, pid_t child, bool guards)
{
    int64_t drained = -1; /* when to kill the rest */
    bool ending = false;
    if (!guards && s->watch != NULL)
        hurry();
    int64_t patient = -1; /* until then, killed processes may still be about to end */
    int64_t next = 0;     /* when to kill them again, even if not all ended ones have been waited for */
    for (;;) {
        int64_t ns = -1;
        long r = reap(s, &child);
        if (r == -ECHILD)
            return;
        if (guards && child == 0 && s->command != 0 && !eb_supervisor_knows_status(s)) {
            child = s->command; /* it was the child of the supervisor, which has been killed */
            guards = false;
            ending = true;
        }
        if (child == 0 && !s->all)
            return; /* what the command leaves behind lives on */
        if (eb_raw(SYS_getppid, 0, 0, 0, 0) != parent || take_wanted(s, child, guards))
            ending = true;
        if (child == 0 && !ending && drained < 0)
            drained = now_ms() + (guards ? 0 : s->drain_ms);
        const int64_t left = drained < 0 ? -1 : drained - now_ms(); /* computed once: must not become negative below */
        if (drained >= 0 && left <= 0)
            ending = true;
        if (!ending && !guards && s->watch != NULL) {
            s->cause = eb_watch_look(s->watch, &ns);
            ending = s->cause != EB_CAUSE_NONE;
        }
        if (ending && patient < 0)
            patient = now_ms() + PATIENCE_MS;
        if (ending && (r == 0 || now_ms() >= next)) {
            const int64_t begun = now_ms();
            if (!end(s, child, guards, begun > patient))
                return;                  /* the rest has other ids */
            next = 2 * now_ms() - begun; /* slow with thousands of ended processes: half of the time at most */
        }
        if (ending)
            ns = TICK_NS;
        else if (drained >= 0 && (ns < 0 || left * 1000000 < ns))
            ns = left * 1000000;
        if (r == 0)
            pause_ns(ns);
    }
}

bool eb_supervisor_kill_rest(struct eb_supervisor *s, bool again)
{
    if (s->all)
        return eb_tree_kill(again);
    eb_supervisor_signal(s, false, SIGKILL);
    return !eb_supervisor_knows_status(s);
}

/* The first steps of guard and supervisor.  Returns 0 or -errno. */
static EB_BARE long begin(pid_t parent)
{
    eb_shorten_slices(); /* otherwise the new program would run before they have closed their descriptors */
    long r = eb_raw(SYS_prctl, PR_SET_PDEATHSIG, SIGTERM, 0, 0);
    if (r == 0)
        r = eb_raw(SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0);
    if (r == 0)
        r = eb_raw(SYS_setpgid, 0, 0, 0, 0); /* so that signals to the caller's group don't reach them */
    if (r == 0 && eb_raw(SYS_getppid, 0, 0, 0, 0) != parent)
        r = -ESRCH; /* the parent has just been killed */
    return r;
}

static EB_BARE void fail(struct eb_supervisor *s, long error)
{
    s->job->stage = eb_job_clone_stage(s->job, (int)error);
    s->job->error = (int)-error;
}

static EB_BARE void leave(void)
{
    eb_raw(SYS_exit_group, 0, 0, 0, 0);
}

/* The command's first step.  The helper learns of the exec from the end of a pipe, but the kernel may run the
 * command before its maker goes on to close the pipe, and until its slice is over. */
static EB_BARE long await_closed(struct eb_job *job)
{
    const struct timespec interval = {.tv_sec = 1};
    struct eb_supervisor *s = job->supervisor;
    if (job->own_memory)
        return 0; /* it can't see what its maker does */
    while (__atomic_load_n(&s->has_closed, __ATOMIC_ACQUIRE) == 0)
        if (eb_raw(SYS_futex, (long)&s->has_closed, FUTEX_WAIT, 0, (long)&interval) == -ETIMEDOUT &&
            __atomic_load_n(&s->alive, __ATOMIC_ACQUIRE) == 0)
            return -ESRCH; /* its maker has been killed; one that only gets no CPU is waited for */
    return 0;
}

/* This closes the guard's descriptors too, because it shares the table. */
static EB_BARE void close_all(struct eb_supervisor *s)
{
    eb_raw(SYS_close_range, 0, ~0U, 0, 0);
    __atomic_store_n(&s->has_closed, 1, __ATOMIC_RELEASE);
    eb_raw(SYS_futex, (long)&s->has_closed, FUTEX_WAKE, 1, 0);
}

static EB_BARE int supervisor(void *arg)
{
    struct eb_supervisor *s = arg;
    long r = begin(s->guard);
    pid_t child = 0;
    if (r == 0) {
        /* The command's pid must be known before its end can be. */
        r = child = eb_job_clone(s->job, 0);
        s->command = child > 0 ? child : 0;
    }
    if (r < 0)
        fail(s, r); /* while the pipe is open, because after that the job may belong to another command */
    close_all(s);
    if (r >= 0)
        supervise(s, s->guard, child, false);
    eb_raw(SYS_getrusage, RUSAGE_CHILDREN, (long)&s->tree, 0, 0);
    if (s->watch != NULL && s->cause == EB_CAUSE_NONE)
        s->cause = eb_watch_conclude(s->watch, &s->tree);
    leave();
    return 0;
}

static EB_BARE int guard(void *arg)
{
    struct eb_supervisor *s = arg;
    struct eb_job *job = s->job;
    long (*first)(struct eb_job *) = job->first;
    job->first = await_closed;
    job->supervisor = s;
    s->guard = (pid_t)eb_raw(SYS_getpid, 0, 0, 0, 0);
    long r = first != NULL ? first(job) : 0;
    if (r == 0)
        r = begin(s->maker);
    if (r == 0) {
        s->alive = 1;
        char *stack = (char *)(((uintptr_t)s & ~(uintptr_t)4095) - GUARD_STACK - GUARD_PAGES);
        r = eb_raw_clone(PROCESS | CLONE_FILES, stack, NULL, &s->alive, supervisor, s);
        if (r < 0)
            s->alive = 0;
    }
    if (r < 0)
        fail(s, r);
    else
        supervise(s, s->maker, (pid_t)r, true);
    if (s->tree.ru_maxrss == 0) /* the supervisor has been killed */
        eb_raw(SYS_getrusage, RUSAGE_CHILDREN, (long)&s->tree, 0, 0);
    leave();
    return 0;
}

pid_t eb_supervisor_start(struct eb_supervisor **made, struct eb_job *job, unsigned flags)
{
    const struct eb_request *q = job->q;
    /* Without close_range, guard and supervisor would keep all descriptors, and the pipe that reports the exec,
     * open. */
    if (!eb_tree_can_be_read() || syscall(SYS_close_range, ~0U, ~0U, 0) != 0)
        return -ENOTSUP;
    struct eb_supervisor *s = map();
    if (s == NULL)
        return -ENOMEM;
    *s = (struct eb_supervisor){
        .job = job,
        .maker = getpid(),
        .all = q->tree_all,
        .drain_ms = q->drain_ms,
        .guard_alive = 1,
    };
    if (eb_has(q, EB_TAG_LIMITS) && (s->watch = eb_watch_new(&q->limits)) == NULL) {
        munmap(memory_of(s), MAPPING);
        return -ENOMEM;
    }
    pid_t pid = (pid_t)eb_raw_clone(PROCESS | flags, s, NULL, &s->guard_alive, guard, s);
    if (pid < 0) {
        if (s->watch != NULL)
            munmap(s->watch, sizeof *s->watch);
        munmap(memory_of(s), MAPPING);
        return pid;
    }
    s->guard = pid;
    *made = s;
    return pid;
}

#else

/* There is no supervisor: spawn_posix.c refuses requests that need one. */

void eb_supervisor_free(struct eb_supervisor *s)
{
    (void)s;
}

bool eb_supervisor_knows_status(const struct eb_supervisor *s)
{
    (void)s;
    return false;
}

void eb_supervisor_note(struct eb_supervisor *s, pid_t pid, int status, const struct rusage *usage)
{
    (void)s, (void)pid, (void)status, (void)usage;
}

bool eb_supervisor_kill_rest(struct eb_supervisor *s, bool again)
{
    (void)s, (void)again;
    return false;
}

void eb_supervisor_signal(struct eb_supervisor *s, bool group, int number)
{
    (void)s, (void)group, (void)number;
}

void eb_supervisor_signal_all(struct eb_supervisor *s, int number)
{
    (void)s, (void)number;
}

#endif
