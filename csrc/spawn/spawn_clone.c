/*
 * The new process shares this one's memory until it execs or exits, and runs at the same time, on a stack of its own.
 * So it makes only raw system calls and writes only to its job, and what it reads stays unchanged until the kernel
 * reports that it no longer uses the memory: CLONE_CHILD_CLEARTID clears a word in the job when the memory is released,
 * and after that the close-on-exec pipe hangs up (Linux fs/exec.c, begin_new_exec: exec_mmap comes before
 * do_close_on_exec; kernel/exit.c: exit_mm before exit_files).  A polled start has no pipe: the word is checked
 * whenever something else has woken us, at the latest the end of the process.
 *
 * If this process is closed to its user, as a job's keeper is, a new process that must write its own files in /proc
 * can't share the memory: whoever may trace it would have both.  It gets a copy, which it opens.
 *
 * A process that changes its ids here still shares our memory for a moment.  The kernel marks memory undumpable at that
 * instant (commit_creds), so processes of the new user cannot trace it, unless the administrator has set
 * fs.suid_dumpable to 1.
 */
#include "spawn/spawn_job.h"
#include "spawn/supervisor.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    SPARE_STACKS = 32, /* at most; of each, two pages stay resident */
    BLOCK = 64,        /* the smallest number of descriptors that the kernel copies */
    FEW = 12,          /* 0 to 2, the pipe, and what tags carry */
    HIGH = 512,        /* from this number on, the table is too large to be copied: 0.1 µs for each descriptor */
};

static const struct eb_state *self;
static struct rlimit nproc;
static bool use_parent;
static uint8_t low[BLOCK]; /* reserved numbers, ascending: copies of an unused descriptor */
static uint32_t low_count;
static struct eb_job *spare; /* unused memory */
static unsigned spare_count;
static struct eb_job *lingering; /* hung up, but still in memory: never seen on Linux, but possible on imitations */

static struct eb_job *new_job(void)
{
    struct eb_job **link = &lingering;
    while (*link != NULL) {
        struct eb_job *job = *link;
        if (job->alive != 0) {
            link = &job->next;
            continue;
        }
        *link = job->next;
        job->next = spare;
        spare = job;
        spare_count++;
    }
    if (spare == NULL)
        return eb_job_map();
    struct eb_job *job = spare;
    spare = job->next;
    spare_count--;
    return job;
}

static void free_job(struct eb_job *job)
{
    if (job->alive != 0) {
        job->next = lingering;
        lingering = job;
    } else if (spare_count < SPARE_STACKS) {
        job->next = spare;
        spare = job;
        spare_count++;
    } else {
        eb_job_unmap(job);
    }
}

static void trim(unsigned kept)
{
    while (spare_count > kept) {
        struct eb_job *job = spare;
        spare = job->next;
        spare_count--;
        eb_job_unmap(job);
    }
}

/* The kernel checks RLIMIT_NPROC when a process is made, so this process must have the caller's limit at that time. */
static void adopt_nproc(const struct eb_request *q)
{
    struct rlimit limit = {.rlim_cur = q->nproc, .rlim_max = nproc.rlim_max};
    if (limit.rlim_cur > limit.rlim_max)
        limit.rlim_cur = limit.rlim_max;
    if (eb_limits(q, RLIMIT_NPROC) && limit.rlim_cur != nproc.rlim_cur && setrlimit(RLIMIT_NPROC, &limit) == 0)
        nproc = limit;
}

static bool reserve(bool whole_block)
{
    int fd;
    while ((fd = fcntl(0, F_DUPFD_CLOEXEC, 3)) >= 0 && fd < BLOCK && (whole_block || low_count < FEW))
        low[low_count++] = (uint8_t)fd;
    if (fd >= 0)
        close(fd);
    return fd >= 0 && syscall(SYS_close_range, ~0U, ~0U, 0) == 0; /* closes nothing, only checks that the call exists */
}

static EB_BARE long take_table(struct eb_job *job)
{
    long r = eb_take_table(job);
    return r == 0 ? eb_tell_table(job) : r;
}

/* The new process has its own table, or was not made: the reserved numbers are free again. */
static void restore_low(uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        eb_raw(SYS_dup3, 0, low[i], O_CLOEXEC, 0);
}

/* If the new process must not have copies of other descriptors, or if many are open: gives its own descriptors
 * reserved numbers, and has it take a table with only those.  Otherwise copying the whole table costs less than
 * waiting for that. */
static void lower_sources(struct eb_job *job, bool apart)
{
    const struct eb_request *q = job->q;
    uint32_t count = eb_request_sources(q);
    int most = job->pipe;
    for (uint32_t i = 0; i < count; i++)
        most = q->sources[i] > most ? q->sources[i] : most;
    if ((!apart && most < HIGH) || count >= low_count)
        return;
    for (uint32_t i = 0; i <= count; i++) {
        int fd = i < count ? q->sources[i] : job->pipe;
        if (fd >= 0 && eb_raw(SYS_dup3, fd, low[i], O_CLOEXEC, 0) < 0) {
            restore_low(i);
            return;
        }
    }
    for (uint32_t i = 0; i < count; i++)
        q->sources[i] = low[i];
    if (job->pipe >= 0)
        job->pipe = low[count];
    job->highest = low[low_count - 1];
    job->shares_table = EB_SHARED;
    job->first = take_table;
}

static pid_t make_process(struct eb_job *job, struct eb_supervisor **supervisor)
{
    const unsigned files = job->shares_table ? CLONE_FILES : 0;
    const bool supervised = eb_has(job->q, EB_TAG_SUPERVISE);
    pid_t pid = supervised ? eb_supervisor_start(supervisor, job, files)
                           : eb_job_clone(job, (use_parent ? CLONE_PARENT : 0) | files);
    if (use_parent && !supervised && job->q->namespaces == 0 && (pid == -EINVAL || pid == -EPERM || pid == -ENOSYS)) {
        /* gVisor and some seccomp profiles refuse CLONE_PARENT: from now on the children are ours. */
        use_parent = false;
        pid = eb_job_clone(job, files);
    }
    if (files != 0) {
        if (pid > 0)
            eb_job_await_table(job, supervised ? &(*supervisor)->guard_alive : &job->alive, pid);
        restore_low(eb_request_sources(job->q) + 1);
    }
    return pid;
}

/* Whether it is to write its own files in /proc, which belong to root while this process is closed to its user. */
static bool needs_own_memory(const struct eb_request *q)
{
    return ((q->namespaces & EB_NEW_USER) != 0 || eb_has(q, EB_TAG_OOM_SCORE_ADJ)) &&
           prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) != 1;
}

static void begin(struct eb_start *start, const struct eb_request *q, bool apart)
{
    int pipe[2] = {-1, -1};
    *start = (struct eb_start){.done_fd = -1, .stage = EB_STAGE_START};
    /* Polling is enough if its end is seen here, and the client does not wait for the outcome: no input, no SPAWNED. */
    bool supervised = eb_has(q, EB_TAG_SUPERVISE);
    bool own_memory = !apart && needs_own_memory(q);
    bool polled = !use_parent && eb_has(q, EB_TAG_COALESCE) && !(q->streams & 1) && !supervised && !own_memory;
    struct eb_job *job = new_job();
    if (job == NULL) {
        start->error = errno;
        return;
    }
    *job = (struct eb_job){.q = q, .self = self, .timed = polled, .own_memory = own_memory};
    if (!polled && pipe2(pipe, O_CLOEXEC | (own_memory ? O_NONBLOCK : 0)) != 0) {
        start->error = errno;
        free_job(job);
        return;
    }
    job->pipe = pipe[1];
    adopt_nproc(q);
    job->nproc = nproc;
    if (!own_memory)
        lower_sources(job, apart);
    pid_t pid = make_process(job, &start->supervisor);
    if (pipe[1] >= 0)
        close(pipe[1]);
    if (pid < 0) {
        if (pipe[0] >= 0)
            close(pipe[0]);
        free_job(job);
        start->error = -pid;
        start->stage = eb_job_clone_stage(job, pid);
        if (supervised && pid == -ENOTSUP)
            start->stage = EB_STAGE_TREE;
        return;
    }
    start->pid = pid;
    start->owner = use_parent && !supervised ? EB_OWNER_CALLER : EB_OWNER_HELPER;
    start->done_fd = pipe[0];
    start->polled = polled;
    start->job = job;
}

static bool is_decided(const struct eb_start *start)
{
    const struct eb_job *job = start->job;
    return __atomic_load_n(&job->alive, __ATOMIC_ACQUIRE) == 0;
}

/* The process may lie, as its user may trace it, but only about itself. */
static void take_failure(struct eb_start *start)
{
    struct eb_failure failure;
    if (read(start->done_fd, &failure, sizeof failure) == sizeof failure) {
        start->error = failure.error > 0 ? failure.error : EPROTO;
        start->stage = failure.stage;
        start->member = failure.member;
    }
}

static void end(struct eb_start *start)
{
    struct eb_job *job = start->job;
    if (job == NULL)
        return;
    start->error = job->error;
    start->stage = job->stage;
    start->member = job->member;
    if (job->own_memory)
        take_failure(start);
    if (start->supervisor != NULL) {
        start->still_read = __atomic_load_n(&job->alive, __ATOMIC_ACQUIRE) != 0;
        start->pid = start->supervisor->command;
        if (start->pid == 0 && start->error == 0)
            start->error = EAGAIN; /* the supervisor and the guard have just been killed */
    }
    start->exec_ns = job->exec_ns;
    if (start->done_fd >= 0)
        close(start->done_fd);
    start->done_fd = -1;
    start->polled = false;
    start->job = NULL;
    free_job(job);
}

const struct eb_spawner *eb_spawner_clone(const struct eb_state *state, bool parent, bool apart)
{
    static const struct eb_spawner spawner = {.begin = begin, .is_decided = is_decided, .end = end, .trim = trim};
    self = state;
    nproc = state->rlimits[RLIMIT_NPROC];
    use_parent = parent;
    /* Reserves nothing if the limit would leave too few numbers. */
    if (state->rlimits[RLIMIT_NOFILE].rlim_max < 4 * BLOCK || !reserve(apart))
        low_count = 0;
    return &spawner;
}

#else

const struct eb_spawner *eb_spawner_clone(const struct eb_state *state, bool parent, bool apart)
{
    (void)state, (void)parent, (void)apart;
    return NULL;
}

#endif
