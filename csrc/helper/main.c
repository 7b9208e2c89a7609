/*
 * errand-boy-helper: serves connections that it is handed over its control socket, and starts the
 * commands that they ask for.  One thread, never waiting but in epoll_wait.
 *
 *   --private         started by the process that it serves: descriptor 4 is that process's pidfd, and new
 *                     processes become that process's children; else it is one of a daemon's
 *   --own-children    keep the children, wait for them and report their ends
 *   --posix-spawn     start through posix_spawn(3); implies --own-children
 *   --max-tasks=N     tell the server after so many starts
 *   --frame-timeout=N milliseconds for the rest of a frame that has begun
 *   --counters        descriptor 4 is a file in memory, for the counters
 *   --open-files=N    the soft limit of open files for commands whose request has none
 *   --uid=N and others: whose process it becomes, see become.h
 *
 * Descriptor 3 is the control socket.  The helper ends when the caller has ended, or when the control
 * socket is at its end and the last connection has gone; a private one also on SIGTERM, when what it does
 * then is done.
 */
#include "common/rawsys.h"
#include "helper/become.h"
#include "helper/control.h"
#include "helper/counters.h"
#include "helper/loop.h"
#include "spawn/slices.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
    CONTROL_FD = 3,
    CALLER_FD = 4,   /* a caller's own helper */
    COUNTERS_FD = 4, /* a daemon's */
};

/* All signals stay blocked for good, so that none but SIGKILL ends the helper in the middle of something: what
 * is typed at the caller's terminal is not for it.  New processes start with none pending. */
static int block_signals(bool private)
{
    sigset_t all, taken;
    sigfillset(&all);
    sigemptyset(&taken);
    sigaddset(&taken, SIGCHLD);
    if (private)
        sigaddset(&taken, SIGTERM); /* from who ends all children of his, and waits for them */
    /* An ignored SIGCHLD, inherited, would reap behind our back. */
    if (sigprocmask(SIG_SETMASK, &all, NULL) != 0 || signal(SIGCHLD, SIG_DFL) == SIG_ERR)
        eb_fatal("signals");
    int fd = signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        eb_fatal("signalfd");
    return fd;
}

/* Not by the user's id: root of a container often lacks them. */
static bool capable(unsigned number)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
    return syscall(SYS_capget, &header, data) == 0 && (data[number / 32].effective >> number % 32 & 1) != 0;
}

/* What this process is, and what its commands inherit of it. */
static void read_self(bool posix)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        if (helper.open_files == 0)
            helper.open_files = files.rlim_cur;
        files.rlim_cur = posix ? helper.open_files : files.rlim_max; /* posix_spawn can't give another one */
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    helper.caller = (struct ucred){.pid = getppid(), .uid = getuid(), .gid = getgid()};
    helper.raises_limits = capable(CAP_SYS_RESOURCE);
    helper.raises_priority = capable(CAP_SYS_NICE);
    eb_state_read_signals(&helper.self);
    eb_state_read(&helper.self);
}

enum { PRIVATE, OWN_CHILDREN, POSIX_SPAWN, COUNTERS, FLAGS };
static bool given[FLAGS];

static bool take_option(const char *option)
{
    static const char flags[FLAGS][16] = {"--private", "--own-children", "--posix-spawn", "--counters"};
    static const char names[][18] = {"--open-files=", "--max-tasks=", "--frame-timeout="};
    uint64_t *const values[] = {&helper.open_files, &helper.max_tasks, &helper.frame_timeout_ms};
    for (int i = 0; i < FLAGS; i++)
        if (strcmp(option, flags[i]) == 0)
            return given[i] = true;
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(names[i]);
        if (strncmp(option, names[i], length) == 0) {
            *values[i] = strtoull(option + length, NULL, 10);
            return true;
        }
    }
    return false;
}

int main(int argc, char **argv)
{
    helper.frame_timeout_ms = 30000;
    for (int i = 1; i < argc; i++)
        if (!take_option(argv[i]) && !eb_become_option(argv[i])) {
            fprintf(stderr, "errand-boy-helper: for errand_boy only\n");
            return 2;
        }
    const bool private = given[PRIVATE], posix = given[POSIX_SPAWN] || !EB_HAVE_RAW, counters = given[COUNTERS];
    int last = private || counters ? CONTROL_FD + 1 : CONTROL_FD;
    for (int fd = 0; fd <= last; fd++)
        if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
            eb_fatal("descriptors 0 to 4");
    /* What else the server was given is not for the commands. */
    (void)syscall(SYS_close_range, last + 1, ~0u, 0);
    eb_become();
    if (!private && !eb_counters_keep(counters ? COUNTERS_FD : -1))
        eb_fatal("counters");
    if (!private && counters)
        close(COUNTERS_FD);
    int signals = block_signals(private);
    read_self(posix);
    eb_shorten_slices();
    helper.pool = !private;
    helper.owns_children = !private || given[OWN_CHILDREN] || posix;
    helper.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    helper.spawner = posix ? NULL : eb_spawner_clone(&helper.self, !helper.owns_children, helper.pool);
    if (helper.spawner == NULL)
        helper.spawner = eb_spawner_posix(&helper.self);
    if (eb_connection_new(CONTROL_FD, 0, 0, true) == NULL)
        eb_fatal("control socket");
    if ((private || eb_has_become()) && !eb_tell_ids())
        eb_fatal("ids");
    eb_serve(signals, private ? CALLER_FD : -1);
    return 0;
}
