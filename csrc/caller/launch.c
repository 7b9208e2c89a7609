#include "caller/launch.h"

#include "common/descriptor.h"
#include "common/rawsys.h"
#include "spawn/rawclone.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>

#if EB_HAVE_RAW

enum { START_STACK = 64 << 10, PROGRAM_FD = 5 };

struct start {
    const char *path;
    char **arguments;
    int program, control, caller, errors;
    long open_max;
    volatile int error;
    const char *volatile step;
};

static EB_BARE void close_from(long least, long open_max)
{
    if (eb_raw(SYS_close_range, least, ~0u, 0, 0) == 0)
        return;
    for (long fd = least; fd < open_max; fd++)
        eb_raw(SYS_close, fd, 0, 0, 0);
}

static EB_BARE bool is_same_file(int fd, const char *path)
{
    struct stat ours, theirs;
    return eb_raw(SYS_fstat, fd, (long)&ours, 0, 0) == 0 &&
           eb_raw(SYS_newfstatat, AT_FDCWD, (long)path, (long)&theirs, 0) == 0 && ours.st_dev == theirs.st_dev &&
           ours.st_ino == theirs.st_ino;
}

/* Executes the program that is open as PROGRAM_FD, also after a change of root or ids.  If a filter refuses
 * execveat, or TOMOYO looks up the kernel's made-up name /dev/fd/5 and does not find it, executes it by a real name. */
static EB_BARE long exec_open(const struct start *s, char **env)
{
    static const char name[] = "/proc/self/fd/5";
    long r = eb_raw5(SYS_execveat, PROGRAM_FD, (long)"", (long)s->arguments, (long)env, AT_EMPTY_PATH);
    if (is_same_file(PROGRAM_FD, name))
        eb_raw(SYS_execve, (long)name, (long)s->arguments, (long)env, 0);
    if (is_same_file(PROGRAM_FD, s->path))
        eb_raw(SYS_execve, (long)s->path, (long)s->arguments, (long)env, 0);
    return r;
}

/* Runs in the caller's memory, while one of the caller's threads waits and the others go on. */
static EB_BARE int helper_child(void *arg)
{
    struct start *s = arg;
    char *env[] = {NULL}; /* the helper must not get the caller's, LD_PRELOAD included */
    s->step = "dup";
    long control = eb_raw(SYS_fcntl, s->control, F_DUPFD, PROGRAM_FD + 1, 0);
    long caller = control < 0 ? control : eb_raw(SYS_fcntl, s->caller, F_DUPFD, PROGRAM_FD + 1, 0);
    long errors = caller < 0 ? caller : eb_raw(SYS_fcntl, s->errors, F_DUPFD, PROGRAM_FD + 1, 0);
    long null, program = -1, r = errors;
    if (r < 0 || (s->program >= 0 && (r = program = eb_raw(SYS_fcntl, s->program, F_DUPFD, PROGRAM_FD + 1, 0)) < 0))
        goto failed;
    if ((r = eb_raw(SYS_dup3, control, 3, 0, 0)) < 0 || (r = eb_raw(SYS_dup3, caller, 4, 0, 0)) < 0)
        goto failed;
    /* The helper's 0 to 2 must be in use, so that no descriptor that it receives gets these numbers.  In a root
     * without /dev the control socket takes them. */
    null = eb_raw(SYS_openat, AT_FDCWD, (long)"/dev/null", O_RDWR, 0);
    for (int fd = 0; fd < 3; fd++)
        if (null != fd && (r = eb_raw(SYS_dup3, null < 0 ? 3 : null, fd, 0, 0)) < 0)
            goto failed;
    if ((r = eb_raw(SYS_dup3, errors, 2, 0, 0)) < 0)
        goto failed;
    if (program >= 0) {
        /* Moves the program below the numbers that are closed; the exec closes it. */
        if ((r = eb_raw(SYS_dup3, program, PROGRAM_FD, O_CLOEXEC, 0)) < 0)
            goto failed;
        close_from(PROGRAM_FD + 1, s->open_max);
        s->step = "execveat";
        r = exec_open(s, env);
    } else {
        close_from(PROGRAM_FD, s->open_max);
        s->step = "execve";
        r = eb_raw(SYS_execve, (long)s->path, (long)s->arguments, (long)env, 0);
    }
failed:
    s->error = (int)-r;
    eb_raw(SYS_exit_group, 127, 0, 0, 0);
    return 127;
}

/*
 * Whether this thread's real, effective and saved ids are the same.  If they are not, an exec has another effect in a
 * process that shares its working directory, root and umask with others: Linux sets the effective ids to the real ones,
 * if the process lacks CAP_SETUID (security/commoncap.c, cap_bprm_creds_from_file).  A root process with another
 * effective user becomes root again.  Linux 6.12 still does that; newer kernels compare the new effective id with the
 * old one, and do not.
 */
static bool has_one_identity(void)
{
    uid_t uids[3];
    gid_t gids[3];
    return getresuid(&uids[0], &uids[1], &uids[2]) == 0 && getresgid(&gids[0], &gids[1], &gids[2]) == 0 &&
           uids[0] == uids[1] && uids[1] == uids[2] && gids[0] == gids[1] && gids[1] == gids[2];
}

int eb_start_helper(int program, const char *path, char **arguments, int control, int errors, int *share_fs,
                    const char **step)
{
    struct start s = {.path = path, .arguments = arguments, .program = program, .control = control, .errors = errors};
    const int flags = CLONE_VM | CLONE_VFORK | SIGCHLD;
    uint64_t all = ~(uint64_t)0, before;
    s.open_max = sysconf(_SC_OPEN_MAX);
    if (s.open_max < 0)
        s.open_max = 1 << 20; /* no limit; close_range makes this irrelevant from Linux 5.9 on */
    *step = "pidfd_open";
    s.caller = eb_above_standard((int)syscall(SYS_pidfd_open, getpid(), 0));
    if (s.caller < 0)
        return -errno;
    *step = "mmap";
    char *stack = mmap(NULL, START_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) {
        int error = errno;
        close(s.caller);
        return -error;
    }
    *share_fs = *share_fs && has_one_identity();
    /* No signal handler of the caller may run in its half-made child. */
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    long pid = eb_raw_clone(flags | (*share_fs ? CLONE_FS : 0), stack + START_STACK, NULL, NULL, helper_child, &s);
    if (pid < 0 && *share_fs && pid != -EAGAIN && pid != -ENOMEM) {
        *share_fs = 0;
        pid = eb_raw_clone(flags, stack + START_STACK, NULL, NULL, helper_child, &s);
    }
    int error = pid < 0 ? (int)-pid : s.error;
    *step = pid < 0 ? "clone" : s.step;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    if (pid > 0 && error != 0)
        while (waitpid((pid_t)pid, NULL, 0) < 0 && errno == EINTR)
            ;
    munmap(stack, START_STACK);
    close(s.caller);
    return error != 0 ? -error : (int)pid;
}

#else

/* For a processor whose clone(2) we don't know.  The helper closes whatever else it inherits. */
int eb_start_helper(int program, const char *path, char **arguments, int control, int errors, int *share_fs,
                    const char **step)
{
    char *env[] = {NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t all;
    int sources[] = {control, eb_above_standard((int)syscall(SYS_pidfd_open, getpid(), 0)), errors}, copies[3];
    const int targets[] = {3, 4, 2};
    pid_t pid = 0;
    (void)program;
    *share_fs = 0;
    *step = "pidfd_open";
    if (sources[1] < 0)
        return -errno;
    *step = "dup";
    int error = 0;
    for (int i = 0; i < 3; i++) /* away from the numbers that they will get */
        if ((copies[i] = error != 0 ? -1 : fcntl(sources[i], F_DUPFD_CLOEXEC, 5)) < 0 && error == 0)
            error = errno;
    close(sources[1]);
    sigfillset(&all);
    if (error == 0 && (error = posix_spawn_file_actions_init(&actions)) == 0) {
        error = posix_spawnattr_init(&attributes);
        if (error == 0) {
            for (int fd = 0; fd < 2 && error == 0; fd++)
                error = posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_RDWR, 0);
            for (int i = 0; i < 3 && error == 0; i++)
                error = posix_spawn_file_actions_adddup2(&actions, copies[i], targets[i]);
            if (error == 0 && (error = posix_spawnattr_setsigmask(&attributes, &all)) == 0)
                error = posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
            *step = "execve";
            if (error == 0)
                error = posix_spawn(&pid, path, &actions, &attributes, arguments, env);
            posix_spawnattr_destroy(&attributes);
        }
        posix_spawn_file_actions_destroy(&actions);
    }
    for (int i = 0; i < 3; i++)
        if (copies[i] >= 0)
            close(copies[i]);
    return error != 0 ? -error : (int)pid;
}

#endif
