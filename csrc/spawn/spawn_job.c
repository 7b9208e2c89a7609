#include "spawn/spawn_job.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include "spawn/rawclone.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum {
    STACK_SIZE = 32 << 10,
    THREAD_STACK = 8 << 10, /* part of the stack, for a thread that makes the process */
    GUARD_SIZE = 64 << 10,  /* at least a page, whatever its size */
};

/* Flags of clone3 only, since Linux 5.5 and 5.7. */
static const uint64_t CLEAR_SIGHAND = 0x100000000, INTO_CGROUP = 0x200000000;

static int has_no_clone3; /* as under seccomp filters, which can't check clone3's flags */

static int dumps_spread = -1;

/* Whether a core dump ends all processes that share the memory, whatever the limit of core files, as before Linux
 * 5.16.  Only the version shows that. */
static bool do_dumps_spread(void)
{
    int known = __atomic_load_n(&dumps_spread, __ATOMIC_RELAXED);
    if (known < 0) {
        struct utsname name;
        char *end = NULL;
        long major = uname(&name) == 0 ? strtol(name.release, &end, 10) : 0;
        long minor = end != NULL && *end == '.' ? strtol(end + 1, NULL, 10) : 0;
        known = major < 5 || (major == 5 && minor < 16);
        __atomic_store_n(&dumps_spread, known, __ATOMIC_RELAXED);
    }
    return known != 0;
}

/* A job lies above its process's stack, in one mapping with a guard area below. */
struct eb_job *eb_job_map(void)
{
    char *memory =
        mmap(NULL, GUARD_SIZE + STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    if (mprotect(memory, GUARD_SIZE, PROT_NONE) != 0) {
        int error = errno;
        munmap(memory, GUARD_SIZE + STACK_SIZE);
        errno = error;
        return NULL;
    }
    uintptr_t top = (uintptr_t)memory + GUARD_SIZE + STACK_SIZE;
    return (struct eb_job *)((top - sizeof(struct eb_job)) & ~(uintptr_t)63);
}

static char *stack_of(const struct eb_job *job)
{
    uintptr_t top = ((uintptr_t)job + sizeof(struct eb_job) + 4095) & ~(uintptr_t)4095;
    return (char *)top - STACK_SIZE;
}

void eb_job_unmap(struct eb_job *job)
{
    munmap(stack_of(job) - GUARD_SIZE, GUARD_SIZE + STACK_SIZE);
}

/* Clones without the maker's handlers, and into the cgroup if `born` says so. */
static EB_BARE long clone3_job(struct eb_job *job, uint64_t flags, size_t stack_size, bool born)
{
    const bool had_handlers = job->has_handlers;
    struct eb_clone_args args = {
        .flags = flags | (had_handlers ? CLEAR_SIGHAND : 0) | (born ? INTO_CGROUP : 0),
        .child_tid = (uintptr_t)&job->alive,
        .parent_tid = (uintptr_t)&job->made,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)stack_of(job),
        .stack_size = stack_size,
        .cgroup = born ? (uint64_t)eb_carried(job->q, EB_TAG_CGROUP) : 0,
    };
    job->has_handlers = false;
    job->joins_cgroup = eb_has(job->q, EB_TAG_CGROUP) && !born;
    long pid = eb_raw_clone3(&args, eb_child, job);
    if (pid < 0)
        job->has_handlers = had_handlers;
    return pid;
}

/* Makes the process, with the lower part of the job's stack. */
static EB_BARE long make_process(struct eb_job *job, uint64_t flags, size_t stack_size)
{
    const struct eb_request *q = job->q;
    const bool has_clone3 = !__atomic_load_n(&has_no_clone3, __ATOMIC_RELAXED), had_handlers = job->has_handlers;
    long pid = -ENOSYS;
    /* If it can't start in the cgroup, for whatever reason, it tries to join, and an error is then the cgroup's. */
    if (has_clone3 && eb_has(q, EB_TAG_CGROUP) && (pid = clone3_job(job, flags, stack_size, true)) > 0)
        return pid;
    pid = -ENOSYS;
    if (has_clone3 && had_handlers)
        pid = clone3_job(job, flags, stack_size, false);
    if (pid == -ENOSYS || pid == -EPERM || pid == -EINVAL) {
        job->joins_cgroup = eb_has(q, EB_TAG_CGROUP);
        pid = eb_raw_clone((unsigned long)flags | SIGCHLD, stack_of(job) + stack_size, &job->made, &job->alive,
                           eb_child, job);
        if (pid > 0 && had_handlers)
            __atomic_store_n(&has_no_clone3, 1, __ATOMIC_RELAXED);
    }
    return pid;
}

/* The thread: makes the process, and is suspended until the process has released the memory. */
static EB_BARE int make_and_wait(void *arg)
{
    struct eb_job *job = arg;
    long r = make_process(job, job->flags, STACK_SIZE - THREAD_STACK);
    if (r < 0) {
        job->made = (pid_t)r;
        eb_raw(SYS_futex, (long)&job->made, FUTEX_WAKE, 1, 0);
    }
    eb_raw(SYS_exit, 0, 0, 0, 0);
    return 0;
}

/*
 * If a process writes its oom_score_adj, the kernel changes that of all processes that share its memory, its maker's
 * included, unless it was made with CLONE_VFORK (fs/proc/base.c, __set_oom_adj).  CLONE_VFORK suspends the thread that
 * calls it, and nothing can interrupt that.  So a separate thread, which runs only this code with all signals blocked,
 * makes the process.  The word `alive` is cleared when this thread ends, after the new process has released the memory.
 */
static EB_BARE long make_by_thread(struct eb_job *job, uint64_t flags)
{
    const unsigned long thread = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    job->flags = (flags & ~(uint64_t)CLONE_CHILD_CLEARTID) | CLONE_VFORK | CLONE_PARENT_SETTID;
    job->by_thread = true;
    job->made = 0;
    long tid = eb_raw_clone(thread | CLONE_CHILD_CLEARTID, job, NULL, &job->alive, make_and_wait, job);
    if (tid < 0)
        return tid;
    while (__atomic_load_n(&job->made, __ATOMIC_ACQUIRE) == 0)
        eb_raw(SYS_futex, (long)&job->made, FUTEX_WAIT, 0, 0);
    return job->made;
}

EB_BARE pid_t eb_job_clone(struct eb_job *job, unsigned flags)
{
    const struct eb_request *q = job->q;
    const unsigned shared = job->own_memory ? 0 : CLONE_VM | CLONE_CHILD_CLEARTID;
    const uint64_t all = flags | shared | q->namespaces;
    job->alive = !job->own_memory;
    job->prevents_dumps = do_dumps_spread();
    if (q->namespaces & EB_NEW_USER) {
        job->user = (uid_t)eb_raw(SYS_geteuid, 0, 0, 0, 0);
        job->group = (gid_t)eb_raw(SYS_getegid, 0, 0, 0, 0);
    }
    if (eb_has(q, EB_TAG_OOM_SCORE_ADJ) && !job->own_memory) {
        long pid = make_by_thread(job, all);
        if (pid < 0 && !job->made)
            job->alive = 0; /* no thread was made */
        return (pid_t)pid;
    }
    long pid = make_process(job, all, (size_t)((char *)job - stack_of(job)));
    if (pid < 0)
        job->alive = 0;
    return (pid_t)pid;
}

EB_BARE enum eb_stage eb_job_clone_stage(const struct eb_job *job, int error)
{
    bool forbidden = error == -EPERM || error == -EINVAL || error == -ENOSPC || error == -EUSERS;
    return forbidden && job->q->namespaces != 0 ? EB_STAGE_NAMESPACES : EB_STAGE_START;
}

void eb_job_await_table(struct eb_job *job, const volatile pid_t *alive, pid_t pid)
{
    const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};
    int pauses = 500, shares = EB_SHARED;
    while (__atomic_load_n(&job->shares_table, __ATOMIC_ACQUIRE) != 0 &&
           __atomic_load_n(alive, __ATOMIC_ACQUIRE) != 0) {
        if (syscall(SYS_futex, &job->shares_table, FUTEX_WAIT, 1, &pause, NULL, 0) == 0 || errno != ETIMEDOUT)
            continue; /* the process has changed the word, or a signal has come */
        if (--pauses > 0)
            continue;
        /* With EB_LATE it goes no further, so that its end is not taken for the program's. */
        if (__atomic_compare_exchange_n(&job->shares_table, &shares, EB_LATE, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            job->stage = EB_STAGE_START;
            job->error = EAGAIN;
            (void)kill(pid, SIGKILL);
        }
        return;
    }
}

#endif
