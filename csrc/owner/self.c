#include "owner/self.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/rawsys.h"

void eb_fatal(const char *what)
{
    fprintf(stderr, "errand-boy-helper: %s: %s\n", what, strerror(errno));
    _exit(1);
}

/* All signals stay blocked for good, so that only SIGKILL ends this process in the middle of something; keys at the
 * caller's terminal are not meant for it.  New processes start with no pending signals. */
int eb_self_block_signals(bool ends)
{
    sigset_t all, taken;
    sigfillset(&all);
    sigemptyset(&taken);
    sigaddset(&taken, SIGCHLD);
    if (ends)
        sigaddset(&taken, SIGTERM);
    /* An inherited, ignored SIGCHLD would have the kernel reap our children. */
    if (sigprocmask(SIG_SETMASK, &all, NULL) != 0 || signal(SIGCHLD, SIG_DFL) == SIG_ERR)
        eb_fatal("signals");
    int fd = signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        eb_fatal("signalfd");
    return fd;
}

void eb_self_keep_descriptors(int last)
{
    for (int fd = 0; fd <= last; fd++)
        if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
            eb_fatal("descriptors from 0 on");
    /* Commands must not get the server's other descriptors. */
    (void)syscall(SYS_close_range, last + 1, ~0u, 0);
}

/* The user's id can't tell, because root of a container often lacks capabilities. */
static bool capable(unsigned number)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
    return syscall(SYS_capget, &header, data) == 0 && (data[number / 32].effective >> number % 32 & 1) != 0;
}

void eb_self_read(struct eb_self *s, bool posix)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        if (s->open_files == 0)
            s->open_files = files.rlim_cur;
        files.rlim_cur = posix ? s->open_files : files.rlim_max; /* posix_spawn can't set another limit for a command */
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    s->raises_limits = capable(CAP_SYS_RESOURCE);
    s->raises_priority = capable(CAP_SYS_NICE);
    eb_state_read_signals(&s->state);
    eb_state_read(&s->state);
}

/* Sets a limit that the request does not have. */
static void default_limit(const struct eb_self *s, struct eb_request *q, int resource, rlim_t soft)
{
    if (eb_limits(q, resource))
        return;
    struct rlimit *limit = &q->rlimits[resource];
    *limit = s->state.rlimits[resource];
    limit->rlim_cur = soft < limit->rlim_max ? soft : limit->rlim_max;
    q->limited |= (uint16_t)(1 << resource);
}

/* Commands must inherit neither this process's own limit of files, nor its limit of processes, which is the last
 * request's (see adopt_nproc).  Limits above this process's hard limits are lowered to these; otherwise no start
 * would succeed if the daemon's limits are lower than its client's. */
void eb_self_complete(const struct eb_self *s, struct eb_request *q)
{
    for (int i = 0; i < EB_MAX_RLIMITS && !s->raises_limits; i++) {
        struct rlimit *limit = &q->rlimits[i];
        if (q->set_limits >> i & 1)
            continue; /* asked for explicitly, so it is refused rather than changed */
        rlim_t most = s->state.rlimits[i].rlim_max;
        limit->rlim_max = limit->rlim_max < most ? limit->rlim_max : most;
        limit->rlim_cur = limit->rlim_cur < limit->rlim_max ? limit->rlim_cur : limit->rlim_max;
    }
    if (!s->raises_priority && q->nice < s->state.nice)
        q->nice = s->state.nice;
    default_limit(s, q, RLIMIT_NOFILE, s->open_files);
    default_limit(s, q, RLIMIT_NPROC, s->state.rlimits[RLIMIT_NPROC].rlim_cur);
}
