/*
 * The first steps of a new process whose maker has threads, signal handlers and many descriptors.  spawn_child.c says
 * what such a process may do.
 */
#include "caller/direct_child.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

static EB_BARE long look_at(long fd, struct stat *info)
{
    return eb_raw(SYS_fstat, fd, (long)info, 0, 0);
}

/* Reopens the maker's `fd`, an end of a pipe or /dev/null, by its name in /proc, if it is the file `wanted`. */
static EB_BARE long reopen(const struct eb_job *job, int fd, const struct stat *wanted, int flags)
{
    char path[sizeof job->proc_fd + 10], digits[10];
    int length = 0, count = 0;
    for (; job->proc_fd[length] != '\0'; length++)
        path[length] = job->proc_fd[length];
    do
        digits[count++] = (char)('0' + fd % 10);
    while ((fd /= 10) > 0);
    while (count > 0)
        path[length++] = digits[--count];
    path[length] = '\0';
    /* If /proc belongs to another PID namespace, this may be another process's file.  So check first: opening a
     * device has effects, and opening a FIFO may take for ever. */
    struct stat info;
    long r = eb_raw(SYS_newfstatat, AT_FDCWD, (long)path, (long)&info, 0);
    if (r < 0)
        return r;
    if (info.st_dev != wanted->st_dev || info.st_ino != wanted->st_ino)
        return -EBADF;
    return eb_raw(SYS_openat, AT_FDCWD, (long)path, flags | O_CLOEXEC, 0);
}

static EB_BARE bool is_reopened(const struct eb_job *job, uint32_t i)
{
    return i < job->q->target_count && job->q->targets[i] < 3 && (job->reopened >> job->q->targets[i] & 1) != 0;
}

/* Takes a table of descriptors of its own; those with high numbers are reopened instead of copied. */
static EB_BARE long own_table(struct eb_job *job)
{
    const struct eb_request *q = job->q;
    struct stat wanted[3];
    long r, modes[3];
    for (uint32_t i = 0; i < 3; i++)
        if (is_reopened(job, i) && ((r = look_at(q->sources[i], &wanted[i])) < 0 ||
                                    (r = modes[i] = eb_raw(SYS_fcntl, q->sources[i], F_GETFL, 0, 0)) < 0))
            return r;
    r = eb_take_table(job);
    if (r < 0)
        return r;
    for (uint32_t i = 0; i < 3; i++)
        if (is_reopened(job, i)) {
            int fd = q->sources[i];
            bool same = i > 0 && is_reopened(job, i - 1) && fd == job->reopened_fd;
            r = same ? q->sources[i - 1] : reopen(job, fd, &wanted[i], modes[i] & O_ACCMODE);
            if (r < 0) {
                job->cannot_reopen = true;
                return r;
            }
            job->reopened_fd = fd;
            q->sources[i] = (int)r;
        }
    return eb_tell_table(job);
}

/* The maker's handlers must not run here; this is for a kernel without CLONE_CLEAR_SIGHAND. */
static EB_BARE long remove_handlers(void)
{
    for (int n = 1; n <= EB_SIGNALS; n++) {
        struct eb_action action;
        long r = eb_raw(SYS_rt_sigaction, n, 0, (long)&action, sizeof action.mask);
        if (r == 0 && action.handler > 1)
            r = eb_set_action(n, false);
        if (r < 0)
            return r;
    }
    return 0;
}

EB_BARE long eb_direct_first(struct eb_job *job)
{
    long r = job->has_handlers ? remove_handlers() : 0;
    return r == 0 && job->shares_table ? own_table(job) : r;
}

#endif
