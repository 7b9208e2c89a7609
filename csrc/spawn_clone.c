/*
 * The new process shares this one's memory until it execs or exits, and runs at the same time, on a stack
 * of its own.  So it makes raw system calls only, writes to nothing but its job, and what it reads stays
 * untouched until the kernel says that it has left: CLONE_CHILD_CLEARTID clears a word in the job when
 * the memory is let go, and after that the close-on-exec pipe hangs up (Linux fs/exec.c, begin_new_exec:
 * exec_mmap comes before do_close_on_exec; kernel/exit.c: exit_mm before exit_files).  A quiet start has
 * no pipe: the word is looked at when something else has woken us, at the latest the process's end.
 *
 * A process that changes its ids here still shares our memory for a moment.  The kernel marks memory
 * undumpable at that instant (commit_creds), so its new user's processes cannot trace it, unless the
 * administrator has set fs.suid_dumpable to 1.
 */
#include "spawn.h"

#include "rawsys.h"

#if defined(__linux__) && EB_HAVE_RAW

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    STACK_SIZE = 32 << 10,
    GUARD_SIZE = 64 << 10, /* at least a page, whatever its size */
    SPARE_STACKS = 1, /* two pages of each stay resident */
    SPARE_STACKS_BUSY = 32,
};

struct job {
    /* written by the new process */
    volatile int error;
    volatile enum eb_stage stage;
    volatile pid_t alive; /* cleared by the kernel */
    /* read by it */
    const struct eb_request *q;
    struct rlimit nproc; /* what this process starts with */
    int pipe; /* -1: none */
    /* ours */
    struct job *next;
};

static const struct eb_state *self;
static struct rlimit nproc;
static bool use_parent;
static struct job *spare;      /* memory that nobody uses */
static unsigned spare_count;
static struct job *lingering;  /* hung up, but not yet let go: not seen on Linux, kept for its imitations */

/* A copy of `fd` whose number is nobody's target, searched from `*least` on. */
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

static EB_BARE long place_fds(struct job *job)
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

/* Closes all but what is needed up to the exec, which may be slow: copies of this process's descriptors would
 * keep others' pipes and connections open as long.  An older kernel leaves them to the exec. */
static EB_BARE void close_rest(const struct job *job)
{
    const struct eb_request *q = job->q;
    long next = 0, extra[] = {job->pipe, eb_has(q, EB_TAG_CWD_FD) ? q->sources[q->target_count] : -1};
    for (uint32_t i = 0;;) {
        long kept = -1;
        while (i < q->target_count && q->targets[i] < next)
            i++;
        if (i < q->target_count)
            kept = q->targets[i];
        for (int k = 0; k < 2; k++)
            if (extra[k] >= next && (kept < 0 || extra[k] < kept))
                kept = extra[k];
        if (kept != next)
            eb_raw(SYS_close_range, next, kept < 0 ? ~0U : (unsigned)kept - 1, 0, 0);
        if (kept < 0)
            return;
        next = kept + 1;
    }
}

/* This process installs no handlers, so only SIG_IGN and SIG_DFL have to be told apart. */
static EB_BARE long set_ignored(uint64_t wanted)
{
    struct {
        uint64_t handler, flags, restorer, mask;
    } action = {0};
    uint64_t differ = wanted ^ self->sigign;
    for (int n = 1; n <= EB_SIGNALS; n++)
        if (differ >> (n - 1) & 1) {
            action.handler = (wanted >> (n - 1) & 1) ? 1 : 0; /* SIG_IGN : SIG_DFL */
            long r = eb_raw(SYS_rt_sigaction, n, (long)&action, 0, sizeof action.mask);
            if (r < 0)
                return r;
        }
    return 0;
}

static EB_BARE long set_rlimits(const struct job *job)
{
    const struct eb_request *q = job->q;
    for (uint32_t i = 0; i < q->rlimit_count; i++) {
        int resource = q->rlimits[i].resource;
        const struct rlimit *limit = &q->rlimits[i].limit;
        const struct rlimit *own = resource == RLIMIT_NPROC ? &job->nproc : &self->rlimits[resource];
        if (limit->rlim_cur != own->rlim_cur || limit->rlim_max != own->rlim_max) {
            long r = eb_raw(SYS_prlimit64, 0, resource, (long)limit, 0);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

static EB_BARE bool same_affinity(const struct eb_request *q)
{
    if (q->affinity_size != self->affinity_size)
        return false;
    for (uint32_t i = 0; i < q->affinity_size; i++)
        if (q->affinity[i] != self->affinity[i])
            return false;
    return true;
}

/* The first error, as execvp(3) tells it: ENOENT and ENOTDIR only if there was no other. */
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

static EB_BARE int child(void *arg)
{
    struct job *job = arg;
    const struct eb_request *q = job->q;
    long r;
#define STEP(name, call)                                                                                \
    do {                                                                                                \
        job->stage = EB_STAGE_##name;                                                                   \
        if ((r = (call)) < 0)                                                                           \
            goto failed;                                                                                \
    } while (0)

    STEP(FDS, place_fds(job));
    close_rest(job);
    if (q->peer != NULL) {
        /* First of all: what follows is done with the peer's rights, not with ours. */
        STEP(GROUPS, eb_raw(SYS_setgroups, q->peer->group_count, (long)q->peer->groups, 0, 0));
        STEP(GID, eb_raw(SYS_setresgid, q->peer->gid, q->peer->gid, q->peer->gid, 0));
        STEP(UID, eb_raw(SYS_setresuid, q->peer->uid, q->peer->uid, q->peer->uid, 0));
    }
    if (eb_has(q, EB_TAG_CWD_FD))
        STEP(CWD, eb_raw(SYS_fchdir, q->sources[q->target_count], 0, 0, 0));
    if (eb_has(q, EB_TAG_CWD))
        STEP(CWD, eb_raw(SYS_chdir, (long)q->cwd, 0, 0, 0));
    if (eb_has(q, EB_TAG_UMASK))
        STEP(UMASK, eb_raw(SYS_umask, (long)q->umask, 0, 0, 0));
    if (eb_has(q, EB_TAG_SIGIGN))
        STEP(SIGNALS, set_ignored(q->sigign));
    if (eb_has(q, EB_TAG_SETSID))
        STEP(SETSID, eb_raw(SYS_setsid, 0, 0, 0, 0));
    if (eb_has(q, EB_TAG_PGROUP) && (q->pgroup != self->pgrp || eb_has(q, EB_TAG_SETSID)))
        STEP(PGROUP, eb_raw(SYS_setpgid, 0, q->pgroup, 0, 0));
    STEP(RLIMITS, set_rlimits(job));
    if (eb_has(q, EB_TAG_NICE) && q->nice != self->nice)
        STEP(NICE, eb_raw(SYS_setpriority, PRIO_PROCESS, 0, q->nice, 0));
    if (eb_has(q, EB_TAG_AFFINITY) && !same_affinity(q))
        STEP(AFFINITY, eb_raw(SYS_sched_setaffinity, 0, q->affinity_size, (long)q->affinity, 0));
    if (eb_has(q, EB_TAG_GROUPS))
        STEP(GROUPS, eb_raw(SYS_setgroups, q->group_count, (long)q->groups, 0, 0));
    if (eb_has(q, EB_TAG_GID))
        STEP(GID, eb_raw(SYS_setresgid, q->gid, q->gid, q->gid, 0));
    if (eb_has(q, EB_TAG_UID))
        STEP(UID, eb_raw(SYS_setresuid, q->uid, q->uid, q->uid, 0));
    if (eb_has(q, EB_TAG_SIGMASK))
        STEP(SIGNALS, eb_raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&q->sigmask, 0, sizeof q->sigmask));
    STEP(EXEC, exec_first(q));
#undef STEP
failed:
    job->error = (int)-r;
    eb_raw(SYS_exit_group, 255, 0, 0, 0);
    return 255;
}

/* A job lies above the stack that its process runs on, in one mapping with a guard below. */
static struct job *new_job(void)
{
    struct job **link = &lingering;
    while (*link != NULL) {
        struct job *job = *link;
        if (job->alive != 0) {
            link = &job->next;
            continue;
        }
        *link = job->next;
        job->next = spare;
        spare = job;
        spare_count++;
    }
    if (spare != NULL) {
        struct job *job = spare;
        spare = job->next;
        spare_count--;
        return job;
    }
    char *memory = mmap(NULL, GUARD_SIZE + STACK_SIZE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    if (mprotect(memory, GUARD_SIZE, PROT_NONE) != 0) {
        int error = errno;
        munmap(memory, GUARD_SIZE + STACK_SIZE);
        errno = error;
        return NULL;
    }
    uintptr_t top = (uintptr_t)memory + GUARD_SIZE + STACK_SIZE;
    return (struct job *)((top - sizeof(struct job)) & ~(uintptr_t)63);
}

static void unmap(struct job *job)
{
    uintptr_t top = ((uintptr_t)job + sizeof(struct job) + 4095) & ~(uintptr_t)4095;
    munmap((char *)top - STACK_SIZE - GUARD_SIZE, GUARD_SIZE + STACK_SIZE);
}

static void free_job(struct job *job)
{
    if (job->alive != 0) {
        job->next = lingering;
        lingering = job;
    } else if (spare_count < SPARE_STACKS_BUSY) {
        job->next = spare;
        spare = job;
        spare_count++;
    } else {
        unmap(job);
    }
}

static void rest(void)
{
    while (spare_count > SPARE_STACKS) {
        struct job *job = spare;
        spare = job->next;
        spare_count--;
        unmap(job);
    }
}

/* RLIMIT_NPROC counts when a process is made: then it must be ours that is the caller's. */
static void adopt_nproc(const struct eb_request *q)
{
    for (uint32_t i = 0; i < q->rlimit_count; i++)
        if (q->rlimits[i].resource == RLIMIT_NPROC && q->rlimits[i].limit.rlim_cur != nproc.rlim_cur) {
            struct rlimit limit = {.rlim_cur = q->rlimits[i].limit.rlim_cur, .rlim_max = nproc.rlim_max};
            if (limit.rlim_cur > limit.rlim_max)
                limit.rlim_cur = limit.rlim_max;
            if (setrlimit(RLIMIT_NPROC, &limit) == 0)
                nproc = limit;
        }
}

static pid_t make_process(struct job *job)
{
    const int flags = CLONE_VM | CLONE_CHILD_CLEARTID | SIGCHLD;
    pid_t pid = clone(child, job, flags | (use_parent ? CLONE_PARENT : 0), job, NULL, NULL, &job->alive);
    if (pid < 0 && use_parent && (errno == EINVAL || errno == EPERM || errno == ENOSYS)) {
        /* gVisor and some seccomp profiles have no CLONE_PARENT: from now on the children are ours. */
        use_parent = false;
        pid = clone(child, job, flags, job, NULL, NULL, &job->alive);
    }
    return pid;
}

static void begin(struct eb_start *start, const struct eb_request *q)
{
    int pipe[2] = {-1, -1};
    *start = (struct eb_start){.done_fd = -1, .stage = EB_STAGE_START};
    /* Its end must be seen here, and nothing of the client's wait for the outcome: no input, no SPAWNED. */
    bool quiet = !use_parent && eb_has(q, EB_TAG_BRIEF) && !(q->streams & 1);
    struct job *job = new_job();
    if (job == NULL) {
        start->error = errno;
        return;
    }
    *job = (struct job){.q = q};
    if (!quiet && pipe2(pipe, O_CLOEXEC) != 0) {
        start->error = errno;
        free_job(job);
        return;
    }
    job->pipe = pipe[1];
    job->alive = 1;
    adopt_nproc(q);
    job->nproc = nproc;
    pid_t pid = make_process(job);
    int error = errno;
    if (pipe[1] >= 0)
        close(pipe[1]);
    if (pid < 0) {
        job->alive = 0;
        if (pipe[0] >= 0)
            close(pipe[0]);
        free_job(job);
        start->error = error;
        return;
    }
    start->pid = pid;
    start->owner = use_parent ? EB_OWNER_CALLER : EB_OWNER_HELPER;
    start->done_fd = pipe[0];
    start->quiet = quiet;
    start->job = job;
}

static bool runs(const struct eb_start *start)
{
    const struct job *job = start->job;
    return __atomic_load_n(&job->alive, __ATOMIC_ACQUIRE) == 0 && job->error == 0;
}

static void end(struct eb_start *start)
{
    struct job *job = start->job;
    if (job == NULL)
        return;
    start->error = job->error;
    start->stage = job->stage;
    if (start->done_fd >= 0)
        close(start->done_fd);
    start->done_fd = -1;
    start->quiet = false;
    start->job = NULL;
    free_job(job);
}

const struct eb_spawner *eb_spawner_clone(const struct eb_state *state, bool parent)
{
    static const struct eb_spawner spawner = {.begin = begin, .runs = runs, .end = end, .rest = rest};
    self = state;
    nproc = state->rlimits[RLIMIT_NPROC];
    use_parent = parent;
    return &spawner;
}

#else

const struct eb_spawner *eb_spawner_clone(const struct eb_state *state, bool parent)
{
    (void)state, (void)parent;
    return NULL;
}

#endif
