#include "caller.h"

#include "rawsys.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/capability.h>
#include <linux/kcmp.h>
#include <sched.h>
#include <sys/prctl.h>
#endif

extern char **environ;

/* -- identity -- */

static uint64_t hash(uint64_t h, uint64_t value)
{
    /* FNV-1a, 64 bits */
    for (int i = 0; i < 8; i++)
        h = (h ^ (value >> (8 * i) & 0xff)) * 0x100000001b3u;
    return h;
}

static const uint64_t HASH_START = 0xcbf29ce484222325u;

#ifdef __linux__

enum { STATUS_SIZE = 16 << 10 };

/* /proc/thread-self/status, whole; false without /proc, or if it does not fit (thousands of groups). */
static bool read_status(char *text)
{
    int fd = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, STATUS_SIZE - 1);
    close(fd);
    if (n <= 0 || n == STATUS_SIZE - 1)
        return false;
    text[n] = '\0';
    return true;
}

/* The number after `label`, searched from *at on, which moves there: the lines have a fixed order. */
static bool find(char **at, const char *label, int base, uint64_t *value)
{
    /* Labels start with a newline.  Much faster than strstr here. */
    size_t length = strlen(label);
    for (char *line = strchr(*at, '\n'); line != NULL; line = strchr(line + 1, '\n'))
        if (line[1] == label[1] && strncmp(line, label, length) == 0) {
            *value = strtoull(line + length, at, base);
            return true;
        }
    return false;
}

static bool find_ids(char **at, const char *label, uint32_t *ids)
{
    uint64_t id;
    if (!find(at, label, 10, &id))
        return false;
    ids[0] = (uint32_t)id;
    for (int i = 1; i < 4; i++)
        ids[i] = (uint32_t)strtoul(*at, at, 10);
    return true;
}

static bool identity_from_status(struct eb_caller *c, struct eb_state *state)
{
    static const char *const sets[] = {"\nCapInh:", "\nCapPrm:", "\nCapEff:", "\nCapBnd:", "\nCapAmb:"};
    struct eb_identity *id = &c->identity;
    char text[STATUS_SIZE], *at = text;
    uint64_t value;
    if (!read_status(text))
        return false;
    if (find(&at, "\nUmask:", 8, &value)) /* Linux 4.7 */
        c->umask = (uint32_t)value;
    if (!find_ids(&at, "\nUid:", id->uids) || !find_ids(&at, "\nGid:", id->gids))
        return false;
    char *groups = strstr(at, "\nGroups:");
    char *line_end = groups == NULL ? NULL : strchr(groups + 1, '\n');
    if (line_end == NULL)
        return false;
    id->groups = HASH_START;
    *line_end = '\0'; /* strtoul would read on in the next line */
    for (char *end = at = groups + 8;; at = end) {
        unsigned long group = strtoul(at, &end, 10);
        if (end == at)
            break;
        id->groups = hash(id->groups, group);
    }
    *line_end = '\n';
    at = line_end;
    if (!find(&at, "\nSigBlk:", 16, &state->sigmask) || !find(&at, "\nSigIgn:", 16, &state->sigign))
        return false;
    for (int i = 0; i < 5; i++)
        if (!find(&at, sets[i], 16, &id->capabilities[i]))
            return false;
    if (!find(&at, "\nNoNewPrivs:", 10, &value))
        return false;
    id->no_new_privs = (int32_t)value;
    if (find(&at, "\nSeccomp:", 10, &value)) /* absent from kernels without it */
        id->seccomp = (int32_t)value;
    if (find(&at, "\nSeccomp_filters:", 10, &value)) /* Linux 5.9 */
        id->seccomp_filters = (int32_t)value;
    id->complete = 1;
    return true;
}

static int identity_from_syscalls(struct eb_identity *id)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    uid_t *uids = id->uids;
    gid_t *gids = id->gids;
    if (getresuid(&uids[0], &uids[1], &uids[2]) != 0 || getresgid(&gids[0], &gids[1], &gids[2]) != 0)
        return errno;
    uids[3] = uids[1];
    gids[3] = gids[1];
    int count = getgroups(0, NULL);
    if (count < 0)
        return errno;
    gid_t *groups = calloc((size_t)count + 1, sizeof *groups);
    if (groups == NULL)
        return ENOMEM;
    count = getgroups(count, groups);
    id->groups = HASH_START;
    for (int i = 0; i < count; i++)
        id->groups = hash(id->groups, groups[i]);
    free(groups);
    if (syscall(SYS_capget, &header, data) == 0) {
        id->capabilities[0] = data[0].inheritable | (uint64_t)data[1].inheritable << 32;
        id->capabilities[1] = data[0].permitted | (uint64_t)data[1].permitted << 32;
        id->capabilities[2] = data[0].effective | (uint64_t)data[1].effective << 32;
    }
    for (int i = 0; i < 64; i++) {
        int bounding = prctl(PR_CAPBSET_READ, i, 0, 0, 0);
        if (bounding < 0)
            break;
        id->capabilities[3] |= (uint64_t)(bounding > 0) << i;
        id->capabilities[4] |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, i, 0, 0) > 0) << i;
    }
    id->no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
    id->securebits = prctl(PR_GET_SECUREBITS, 0, 0, 0, 0);
    id->seccomp = prctl(PR_GET_SECCOMP, 0, 0, 0, 0);
    /* Whether another filter has been added to the first is not to be had. */
    id->complete = id->seccomp == 0;
    return 0;
}

/* Also the signals of `state`, which /proc tells at the same price. */
static int read_identity(struct eb_caller *c, struct eb_state *state)
{
    if (identity_from_status(c, state)) {
        c->identity.securebits = prctl(PR_GET_SECUREBITS, 0, 0, 0, 0);
        return 0;
    }
    memset(&c->identity, 0, sizeof c->identity);
    eb_state_read_signals(state);
    return identity_from_syscalls(&c->identity);
}

static bool fs_differs(int helper)
{
    /* EPERM, ENOSYS: not to be known here */
    return helper > 0 && syscall(SYS_kcmp, syscall(SYS_gettid), helper, KCMP_FS, 0, 0) > 0;
}

#else

static int read_identity(struct eb_caller *c, struct eb_state *state)
{
    struct eb_identity *id = &c->identity;
    eb_state_read_signals(state);
    id->uids[0] = getuid();
    id->uids[1] = geteuid();
    id->gids[0] = getgid();
    id->gids[1] = getegid();
    id->complete = 1;
    return 0;
}

static bool fs_differs(int helper)
{
    (void)helper;
    return false;
}

#endif

/* -- the calling thread -- */

static bool same_file(int fd, uint64_t device, uint64_t inode)
{
    struct stat info;
    return fd >= 0 && fstat(fd, &info) == 0 && info.st_dev == device && info.st_ino == inode;
}

static bool fits(const struct eb_caller *c, const struct eb_caller *start, int helper)
{
    /* What only a privilege can raise again has not been raised since. */
    for (int i = 0; i < EB_MAX_RLIMITS; i++)
        if (c->hard_limits[i] > start->hard_limits[i])
            return false;
    return c->nice >= start->nice && memcmp(&c->identity, &start->identity, sizeof c->identity) == 0 &&
           !fs_differs(helper);
}

static void put_option(struct eb_writer *w, enum eb_tag tag, uint32_t size)
{
    eb_put_u8(w, tag);
    eb_put_u32(w, size);
}

static void put_options(struct eb_caller *c, const struct eb_state *s, int flags)
{
    struct eb_writer w = eb_writer(c->options, sizeof c->options);
    uint64_t sigign = s->sigign;
    if (flags & EB_RESTORE_SIGNALS)
        sigign &= ~((uint64_t)1 << (SIGPIPE - 1) | (uint64_t)1 << (SIGXFSZ - 1));
    put_option(&w, EB_TAG_SIGMASK, 8);
    eb_put_u64(&w, s->sigmask);
    put_option(&w, EB_TAG_SIGIGN, 8);
    eb_put_u64(&w, sigign);
    if (flags & EB_WITH_PGROUP) {
        put_option(&w, EB_TAG_PGROUP, 4);
        eb_put_u32(&w, (uint32_t)s->pgrp);
    }
    put_option(&w, EB_TAG_RLIMITS, EB_MAX_RLIMITS * 17);
    for (int i = 0; i < EB_MAX_RLIMITS; i++) {
        eb_put_u8(&w, (uint8_t)i);
        eb_put_u64(&w, s->rlimits[i].rlim_cur);
        eb_put_u64(&w, s->rlimits[i].rlim_max);
    }
    put_option(&w, EB_TAG_NICE, 4);
    eb_put_u32(&w, (uint32_t)s->nice);
    if (s->affinity_size > 0) {
        put_option(&w, EB_TAG_AFFINITY, s->affinity_size);
        eb_put_bytes(&w, s->affinity, s->affinity_size);
    }
    c->options_size = w.bad ? 0 : (uint32_t)eb_written(&w);
}

int eb_caller_read(struct eb_caller *c, const struct eb_caller *start, int helper, int flags, int fd,
                   uint64_t device, uint64_t inode)
{
    struct eb_state state = {0};
    memset(&c->identity, 0, sizeof c->identity);
    c->umask = UINT32_MAX;
    int error = read_identity(c, &state);
    if (error != 0)
        return -error;
    c->identity.pid = getpid();
    c->identity.sid = getsid(0);
    if (c->umask == UINT32_MAX && flags & EB_WITH_UMASK) {
        c->umask = umask(077);
        umask(c->umask);
    }
    eb_state_read(&state);
    c->nice = state.nice;
    for (int i = 0; i < EB_MAX_RLIMITS; i++)
        c->hard_limits[i] = state.rlimits[i].rlim_max;
    put_options(c, &state, flags);

    int found = same_file(fd, device, inode) ? EB_CONNECTION : 0;
    for (int i = 0; i < 3; i++) {
        int fd_flags = fcntl(i, F_GETFD);
        if (fd_flags >= 0 && !(fd_flags & FD_CLOEXEC))
            found |= EB_STDIN << i;
    }
    if (start != NULL && fits(c, start, helper))
        found |= c->identity.complete ? EB_FITS : EB_FITS | EB_UNSURE;
    return found;
}

int eb_caller_read_environment(struct eb_caller *c)
{
    size_t size = 4;
    uint32_t count = 0;
    for (char **e = environ; e != NULL && *e != NULL; e++, count++)
        size += strlen(*e) + 1;
    if (size > c->environment_capacity) {
        uint8_t *data = realloc(c->environment, size);
        if (data == NULL)
            return ENOMEM;
        c->environment = data;
        c->environment_capacity = size;
    }
    struct eb_writer w = eb_writer(c->environment, size);
    eb_put_u32(&w, count);
    for (uint32_t i = 0; i < count; i++)
        eb_put_bytes(&w, environ[i], strlen(environ[i]) + 1);
    c->environment_size = eb_written(&w);
    return 0;
}

struct eb_caller *eb_caller_new(void)
{
    return calloc(1, sizeof(struct eb_caller));
}

void eb_caller_free(struct eb_caller *c)
{
    free(c->environment);
    free(c);
}

/* -- starting the helper -- */

#if defined(__linux__) && EB_HAVE_RAW

enum { START_STACK = 64 << 10, PROGRAM_FD = 5 };

struct start {
    const char *path;
    char **arguments;
    int program, control, caller;
    long open_max;
    volatile int error;
};

static EB_BARE void close_from(long least, long open_max)
{
    if (eb_raw(SYS_close_range, least, ~0u, 0, 0) == 0)
        return;
    for (long fd = least; fd < open_max; fd++)
        eb_raw(SYS_close, fd, 0, 0, 0);
}

/* In the caller's memory, while one of its threads waits: the others go on. */
static EB_BARE int helper_child(void *arg)
{
    struct start *s = arg;
    char *env[] = {NULL}; /* nothing of the caller's, LD_PRELOAD included, is meant for the helper */
    long control = eb_raw(SYS_fcntl, s->control, F_DUPFD, PROGRAM_FD + 1, 0);
    long caller = control < 0 ? control : eb_raw(SYS_fcntl, s->caller, F_DUPFD, PROGRAM_FD + 1, 0);
    long null, program = -1, r = caller;
    if (r < 0 || (s->program >= 0 && (r = program = eb_raw(SYS_fcntl, s->program, F_DUPFD, PROGRAM_FD + 1, 0)) < 0))
        goto failed;
    if ((r = eb_raw(SYS_dup3, control, 3, 0, 0)) < 0 || (r = eb_raw(SYS_dup3, caller, 4, 0, 0)) < 0)
        goto failed;
    /* The helper's own 0 to 2 must be taken, lest a descriptor that it receives lands there; in a root
     * without /dev the control socket does. */
    null = eb_raw(SYS_openat, AT_FDCWD, (long)"/dev/null", O_RDWR, 0);
    for (int fd = 0; fd < 3; fd++)
        if (null != fd && (r = eb_raw(SYS_dup3, null < 0 ? 3 : null, fd, 0, 0)) < 0)
            goto failed;
    if (program >= 0) {
        /* On a number below those that are closed; it goes with the exec. */
        if ((r = eb_raw(SYS_dup3, program, PROGRAM_FD, O_CLOEXEC, 0)) < 0)
            goto failed;
        close_from(PROGRAM_FD + 1, s->open_max);
        r = eb_raw5(SYS_execveat, PROGRAM_FD, (long)"", (long)s->arguments, (long)env, AT_EMPTY_PATH);
    } else {
        close_from(PROGRAM_FD, s->open_max);
        r = eb_raw(SYS_execve, (long)s->path, (long)s->arguments, (long)env, 0);
    }
failed:
    s->error = (int)-r;
    eb_raw(SYS_exit_group, 127, 0, 0, 0);
    return 127;
}

int eb_start_helper(int program, const char *path, char **arguments, int control, int *share_fs)
{
    struct start s = {.path = path, .arguments = arguments, .program = program, .control = control};
    const int flags = CLONE_VM | CLONE_VFORK | SIGCHLD;
    uint64_t all = ~(uint64_t)0, before;
    s.open_max = sysconf(_SC_OPEN_MAX);
    if (s.open_max < 0)
        s.open_max = 1 << 20; /* no limit; close_range makes this moot on Linux 5.9 */
    s.caller = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (s.caller < 0)
        return -errno;
    char *stack = mmap(NULL, START_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) {
        int error = errno;
        close(s.caller);
        return -error;
    }
    /* No signal handler of the caller's may run in its half-made child. */
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    pid_t pid = clone(helper_child, stack + START_STACK, flags | (*share_fs ? CLONE_FS : 0), &s);
    if (pid < 0 && *share_fs && errno != EAGAIN && errno != ENOMEM) {
        *share_fs = 0;
        pid = clone(helper_child, stack + START_STACK, flags, &s);
    }
    int error = pid < 0 ? errno : s.error;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    if (pid > 0 && error != 0)
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
    munmap(stack, START_STACK);
    close(s.caller);
    return error != 0 ? -error : pid;
}

#else

int eb_start_helper(int program, const char *path, char **arguments, int control, int *share_fs)
{
    (void)program, (void)path, (void)arguments, (void)control, (void)share_fs;
    return -ENOSYS;
}

#endif
