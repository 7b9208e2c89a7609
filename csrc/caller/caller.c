#include "caller/caller.h"

#include "common/descriptor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <linux/capability.h>
#include <linux/kcmp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static uint64_t hash(uint64_t h, uint64_t value)
{
    /* FNV-1a, 64 bits */
    for (int i = 0; i < 8; i++)
        h = (h ^ (value >> (8 * i) & 0xff)) * 0x100000001b3u;
    return h;
}

static const uint64_t HASH_START = 0xcbf29ce484222325u;

static bool same_file(int fd, uint64_t device, uint64_t inode)
{
    struct stat info;
    return fd >= 0 && fstat(fd, &info) == 0 && info.st_dev == device && info.st_ino == inode;
}

enum { STATUS_SIZE = 16 << 10 };

/* A descriptor of this thread's /proc/thread-self/status, or -1.  It is kept open, because opening it costs more
 * than reading it.  A descriptor that somebody has closed, or that belongs to another thread, is noticed. */
static int status_fd(struct eb_caller *c)
{
    pid_t thread = (pid_t)syscall(SYS_gettid);
    if (same_file(c->status_fd, c->status_device, c->status_inode)) {
        if (c->status_thread == thread)
            return c->status_fd;
        close(c->status_fd);
    }
    struct stat info;
    c->status_fd = eb_above_standard(open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC));
    if (c->status_fd >= 0 && fstat(c->status_fd, &info) == 0) {
        c->status_device = info.st_dev;
        c->status_inode = info.st_ino;
        c->status_thread = thread;
    }
    return c->status_fd;
}

/* Reads the whole file; false without /proc, or if the file does not fit (thousands of groups). */
static bool read_status(struct eb_caller *c, char *text)
{
    int fd = status_fd(c);
    ssize_t n = fd < 0 ? -1 : pread(fd, text, STATUS_SIZE - 1, 0);
    if (n <= 0 || n == STATUS_SIZE - 1)
        return false;
    text[n] = '\0';
    return true;
}

/* Finds the number after `label`, searching from *at on, and moves *at there: the lines have a fixed order. */
static bool find(char **at, const char *label, int base, uint64_t *value)
{
    /* Labels start with a newline.  This is much faster than strstr here. */
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

static bool identity_from_status(struct eb_caller *c)
{
    struct eb_state *state = &c->state;
    static const char *const sets[] = {"\nCapInh:", "\nCapPrm:", "\nCapEff:", "\nCapBnd:", "\nCapAmb:"};
    struct eb_identity *id = &c->identity;
    char text[STATUS_SIZE], *at = text;
    uint64_t value;
    if (!read_status(c, text))
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
    *line_end = '\0'; /* otherwise strtoul would go on reading in the next line */
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
    /* It can't be known whether another filter has been added to the first. */
    id->complete = id->seccomp == 0;
    return 0;
}

/* Also reads the signals of the state, which the same file has at no extra cost. */
static int read_identity(struct eb_caller *c)
{
    if (identity_from_status(c)) {
        c->identity.securebits = prctl(PR_GET_SECUREBITS, 0, 0, 0, 0);
        return 0;
    }
    memset(&c->identity, 0, sizeof c->identity);
    eb_state_read_signals(&c->state);
    return identity_from_syscalls(&c->identity);
}

static bool fs_differs(int helper)
{
    /* EPERM, ENOSYS: it can't be known here */
    return syscall(SYS_kcmp, syscall(SYS_gettid), helper, KCMP_FS, 0, 0) > 0;
}

static void read_root(struct eb_caller *c)
{
    struct stat info;
    c->root_device = c->root_inode = 0;
    if (stat("/", &info) == 0) {
        c->root_device = info.st_dev;
        c->root_inode = info.st_ino;
    }
}

/* Whether the helper sees the same files as the caller. */
static bool fits_fs(struct eb_caller *c, const struct eb_caller *start, int helper)
{
    if (helper > 0)
        return !fs_differs(helper);
    read_root(c);
    return c->root_device == start->root_device && c->root_inode == start->root_inode;
}

static bool fits(struct eb_caller *c, const struct eb_caller *start, int helper)
{
    /* Hard limits, which only a privileged process can raise, must not have been raised since. */
    for (int i = 0; i < EB_MAX_RLIMITS; i++)
        if (c->state.rlimits[i].rlim_max > start->state.rlimits[i].rlim_max)
            return false;
    return c->state.nice >= start->state.nice && memcmp(&c->identity, &start->identity, sizeof c->identity) == 0 &&
           fits_fs(c, start, helper);
}

int eb_standard_fds(void)
{
    int found = 0;
    for (int i = 0; i < 3; i++) {
        int fd_flags = fcntl(i, F_GETFD);
        if (fd_flags >= 0 && !(fd_flags & FD_CLOEXEC))
            found |= EB_HAS_STDIN << i;
    }
    return found;
}

int eb_caller_read(struct eb_caller *c, const struct eb_caller *start, int helper, int flags, int fd, uint64_t device,
                   uint64_t inode)
{
    memset(&c->identity, 0, sizeof c->identity);
    memset(&c->state, 0, sizeof c->state);
    c->umask = UINT32_MAX;
    int error = read_identity(c);
    if (error != 0)
        return -error;
    c->identity.pid = getpid();
    c->identity.sid = getsid(0);
    if (c->umask == UINT32_MAX && flags & EB_WITH_UMASK) {
        c->umask = umask(077);
        umask(c->umask);
    }
    if (flags & EB_WITH_ROOT)
        read_root(c);
    eb_state_read(&c->state);

    int found = eb_standard_fds();
    if (same_file(fd, device, inode))
        found |= EB_CONNECTION;
    if (start != NULL && fits(c, start, helper))
        found |= c->identity.complete ? EB_FITS : EB_FITS | EB_UNSURE;
    return found;
}

void eb_caller_init(struct eb_caller *c)
{
    *c = (struct eb_caller){.status_fd = -1};
}

void eb_caller_close(struct eb_caller *c)
{
    if (same_file(c->status_fd, c->status_device, c->status_inode))
        close(c->status_fd);
    c->status_fd = -1;
}

struct eb_caller *eb_caller_new(void)
{
    struct eb_caller *c = malloc(sizeof *c);
    if (c != NULL)
        eb_caller_init(c);
    return c;
}

void eb_caller_free(struct eb_caller *c)
{
    eb_caller_close(c);
    free(c);
}
