#include "caller/direct.h"

#include "caller/direct_child.h"
#include "common/rawsys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if EB_HAVE_RAW

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <time.h>

enum {
    SPARE = 16, /* each has a stack with two resident pages */
    /* From this number on, the child reopens a pipe, which takes some 5 µs.  Below it, the kernel copies the table
     * up to the pipe, which takes 0.1 µs for each descriptor. */
    HIGH = 128,
};

/* Used without a lock, because a forked process could find it locked for ever. */
static struct eb_direct *spare[SPARE];
static struct eb_direct *lingering; /* released while they were pending */

static int works = -1;
static int cannot_reopen;

bool eb_direct_works(void)
{
    int known = __atomic_load_n(&works, __ATOMIC_RELAXED);
    if (known < 0) {
        /* This closes nothing, only checks that the call exists. */
        known = syscall(SYS_close_range, ~0U, ~0U, 0) == 0;
        __atomic_store_n(&works, known, __ATOMIC_RELAXED);
    }
    return known != 0;
}

static void free_direct(struct eb_direct *d)
{
    if (d->job != NULL)
        eb_job_unmap(d->job);
    eb_request_free(&d->q);
    eb_spawn_frame_clear(&d->frame);
    free(d);
}

static bool is_pending(const struct eb_direct *d)
{
    return d->job != NULL && __atomic_load_n(&d->job->alive, __ATOMIC_ACQUIRE) != 0 && d->maker == getpid();
}

static void linger(struct eb_direct *d)
{
    d->next = __atomic_load_n(&lingering, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&lingering, &d->next, d, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
        ;
}

/* Reclaims starts that were released while they were pending, and are not pending any more. */
static void collect(void)
{
    if (__atomic_load_n(&lingering, __ATOMIC_RELAXED) == NULL)
        return;
    struct eb_direct *d = __atomic_exchange_n(&lingering, NULL, __ATOMIC_ACQUIRE);
    while (d != NULL) {
        struct eb_direct *next = d->next;
        eb_direct_give(d);
        d = next;
    }
}

struct eb_direct *eb_direct_take(void)
{
    collect();
    for (int i = 0; i < SPARE; i++)
        if (__atomic_load_n(&spare[i], __ATOMIC_RELAXED) != NULL) {
            struct eb_direct *d = __atomic_exchange_n(&spare[i], NULL, __ATOMIC_ACQUIRE);
            if (d != NULL)
                return d;
        }
    struct eb_direct *d = calloc(1, sizeof *d);
    if (d == NULL)
        return NULL;
    eb_spawn_frame_init(&d->frame);
    d->job = eb_job_map();
    if (d->job == NULL) {
        free_direct(d);
        return NULL;
    }
    d->job->alive = 0;
    return d;
}

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* Waits for the kernel to clear the word, until about `end` or until a signal comes. */
static bool wait_until_cleared(volatile pid_t *word, int64_t end)
{
    int64_t rest = end - now_us();
    if (rest <= 0)
        return false;
    struct timespec t = {.tv_sec = rest / 1000000, .tv_nsec = rest % 1000000 * 1000};
    /* Not FUTEX_PRIVATE_FLAG, because the kernel wakes without it. */
    return syscall(SYS_futex, word, FUTEX_WAIT, 1, &t, NULL, 0) == 0 || errno == EAGAIN;
}

void eb_direct_give(struct eb_direct *d)
{
    if (is_pending(d)) {
        /* The caller is about to close descriptors that the child must take over. */
        eb_job_await_table(d->job, &d->job->alive, d->pid);
        linger(d);
        return;
    }
    eb_request_free(&d->q);
    eb_spawn_frame_done(&d->frame);
    for (int i = 0; i < SPARE; i++) {
        struct eb_direct *none = NULL;
        if (__atomic_load_n(&spare[i], __ATOMIC_RELAXED) == NULL &&
            __atomic_compare_exchange_n(&spare[i], &none, d, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
            return;
    }
    free_direct(d);
}

/* Returns which of the descriptors for 0 to 2 the child reopens; sets `highest` to the highest of all others. */
static uint8_t choose_reopened(const struct eb_request *q, int flags, int *highest)
{
    uint8_t reopened = 0;
    int most = 2;
    *highest = 2;
    for (uint32_t i = 0; i < eb_request_sources(q); i++) {
        bool own = i < q->target_count && q->targets[i] < 3 && (flags & EB_OWN_STDIN << q->targets[i]) != 0;
        if (q->sources[i] > most)
            most = q->sources[i];
        if (own && q->sources[i] >= HIGH)
            reopened |= (uint8_t)(1 << q->targets[i]);
        else if (q->sources[i] > *highest)
            *highest = q->sources[i];
    }
    /* In a new user namespace the child may not look there. */
    if (reopened != 0 && *highest < HIGH && q->namespaces == 0 && !__atomic_load_n(&cannot_reopen, __ATOMIC_RELAXED))
        return reopened;
    *highest = most;
    return 0;
}

static void prepare_job(struct eb_direct *d)
{
    struct eb_job *job = d->job;
    memcpy(d->q.sources, d->frame.fds, d->frame.fd_count * sizeof *d->q.sources);
    *job = (struct eb_job){.q = &d->q, .pipe = -1, .has_handlers = true, .first = eb_direct_first};
    if (d->flags & EB_KEEP_FILES) {
        job->keeps_files = true;
        return;
    }
    job->shares_table = EB_SHARED;
    job->reopened = choose_reopened(&d->q, d->flags, &job->highest);
    if (job->reopened != 0)
        (void)snprintf(job->proc_fd, sizeof job->proc_fd, "/proc/%d/fd/", (int)d->maker);
}

static int make_process(struct eb_direct *d)
{
    const uint64_t all = ~(uint64_t)0;
    uint64_t mask;
    struct eb_job *job = d->job;
    d->error = 0;
    d->stage = EB_STAGE_START;
    d->member = 0;
    /* No handler of the caller may run in the new process, which sets its mask in its last step before the exec. */
    if (syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &mask, sizeof all) != 0)
        return d->error = errno;
    if (!eb_has(&d->q, EB_TAG_SIGMASK))
        d->q.sigmask = mask;
    d->q.present |= (uint64_t)1 << EB_TAG_SIGMASK;
    pid_t pid = eb_job_clone(job, job->shares_table ? CLONE_FILES : 0);
    (void)syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof all);
    if (pid > 0)
        d->pid = pid;
    else if ((d->stage = eb_job_clone_stage(job, pid)) == EB_STAGE_START &&
             (pid == -EPERM || pid == -EINVAL)) /* a filter may refuse with these errors */
        d->error = ENOSYS;
    else
        d->error = -pid;
    return d->error;
}

int eb_direct_begin(struct eb_direct *d, int flags, const uint8_t *options, size_t size,
                    const struct eb_wanted_fds *wanted)
{
    char reason[EB_MAX_REASON];
    d->maker = getpid();
    d->pid = 0;
    d->stage = EB_STAGE_EXEC; /* so that the error for E2BIG names the program */
    d->error = eb_spawn_frame_build(&d->frame, eb_standard_fds(), flags | EB_WITHOUT_STATE, options, size, wanted);
    if (d->error != 0)
        return d->error;
    d->error = eb_request_parse(&d->q, d->frame.frame + EB_HEADER_SIZE, d->frame.size - EB_HEADER_SIZE, reason);
    if (d->error != 0)
        return d->error = d->error < 0 ? EINVAL : d->error;
    d->flags = flags;
    prepare_job(d);
    return make_process(d);
}

void eb_direct_reap(struct eb_direct *d)
{
    /* ECHILD: another thread waits for any child, or SIGCHLD is ignored. */
    while (waitpid(d->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    d->pid = 0;
}

/* Called when the new process has released the memory.  Returns whether the start is decided. */
static bool decide(struct eb_direct *d)
{
    const struct eb_job *job = d->job;
    if (d->maker != getpid()) { /* only the maker learns the outcome, and has the process as a child */
        d->error = 0;
        return true;
    }
    d->error = job->error;
    d->stage = job->stage;
    d->member = job->member;
    if (job->cannot_reopen) {
        /* /proc is missing, or belongs to another PID namespace, or the caller is not dumpable: copy from now on. */
        __atomic_store_n(&cannot_reopen, 1, __ATOMIC_RELAXED);
        eb_direct_reap(d);
        prepare_job(d);
        return make_process(d) != 0;
    }
    /* There was no memory for a table of descriptors; or EAGAIN: the child did not get one in time. */
    bool is_short = d->error == ENOMEM || d->error == EMFILE || d->error == EAGAIN;
    if (d->error != 0 && d->stage == EB_STAGE_START && !is_short)
        d->error = ENOSYS;
    return true;
}

int eb_direct_wait(struct eb_direct *d, uint32_t microseconds)
{
    int64_t end = now_us() + microseconds;
    for (;;) {
        if (!is_pending(d)) {
            if (decide(d))
                return 1;
        } else if (!wait_until_cleared(&d->job->alive, end)) {
            return is_pending(d) ? 0 : decide(d);
        }
    }
}

#else

bool eb_direct_works(void)
{
    return false;
}

void eb_direct_reap(struct eb_direct *d)
{
    (void)d;
}

struct eb_direct *eb_direct_take(void)
{
    errno = ENOSYS;
    return NULL;
}

void eb_direct_give(struct eb_direct *d)
{
    (void)d;
}

int eb_direct_begin(struct eb_direct *d, int flags, const uint8_t *options, size_t size,
                    const struct eb_wanted_fds *wanted)
{
    (void)d, (void)flags, (void)options, (void)size, (void)wanted;
    return ENOSYS;
}

int eb_direct_wait(struct eb_direct *d, uint32_t microseconds)
{
    (void)d, (void)microseconds;
    return 1;
}

#endif
