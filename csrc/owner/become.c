/*
 * The order matters.  First come the steps that need root's rights: the audit's login id, groups, gid, uid.  Then
 * follow those that need the user's rights: the session keyring and the working directory.  Last, the process becomes
 * traceable for its user, like any program that the user has executed; until then nobody may trace it.
 */
#include "owner/become.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MOST_GROUPS = 1 << 16 }; /* NGROUPS_MAX */

static struct {
    bool given;
    uid_t uid;
    gid_t gid;
    gid_t *groups;
    size_t count;
    const char *directory;
} user = {.uid = (uid_t)-1, .gid = (gid_t)-1};

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "errand-boy-helper: cannot become user %u: %s: %s\n", (unsigned)user.uid, what, strerror(errno));
    exit(1);
}

/* Parses a number that `end` follows; returns the rest. */
static const char *number(const char *text, char end, unsigned *value)
{
    char *rest;
    errno = 0;
    unsigned long long n = strtoull(text, &rest, 10);
    if (rest == text || *text < '0' || *text > '9' || n >= (unsigned)-1 || (*rest != '\0' && *rest != end)) {
        errno = EINVAL;
        fail("a number");
    }
    *value = (unsigned)n;
    return *rest == '\0' ? rest : rest + 1;
}

static void add_groups(const char *list)
{
    size_t count = user.count + 1;
    for (const char *at = list; *at != '\0'; at++)
        count += *at == ',';
    gid_t *groups = count <= MOST_GROUPS ? realloc(user.groups, count * sizeof *groups) : NULL;
    if (groups == NULL)
        fail("groups");
    user.groups = groups;
    while (*list != '\0')
        list = number(list, ',', &user.groups[user.count++]);
}

bool eb_become_option(const char *argument)
{
    if (strncmp(argument, "--uid=", 6) == 0) {
        user.given = true;
        (void)number(argument + 6, '\0', &user.uid);
    } else if (strncmp(argument, "--gid=", 6) == 0) {
        (void)number(argument + 6, '\0', &user.gid);
    } else if (strncmp(argument, "--groups=", 9) == 0) {
        add_groups(argument + 9);
    } else if (strncmp(argument, "--chdir=", 8) == 0) {
        user.directory = argument + 8;
    } else {
        return false;
    }
    return true;
}

bool eb_has_become(void)
{
    return user.given;
}

/* Sets the id that audit and `ps -o luid` show.  It stays unchanged if the kernel has no audit, or lets nobody set
 * it. */
static void set_login_uid(void)
{
    int fd = open("/proc/self/loginuid", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)dprintf(fd, "%u", (unsigned)user.uid);
    close(fd);
}

static void check_ids(void)
{
    uid_t uids[3];
    gid_t gids[3];
    if (getresuid(&uids[0], &uids[1], &uids[2]) != 0 || getresgid(&gids[0], &gids[1], &gids[2]) != 0)
        fail("ids");
    for (int i = 0; i < 3; i++)
        if (uids[i] != user.uid || gids[i] != user.gid) {
            errno = EPERM;
            fail("ids");
        }
    /* The kernel sorts groups, so get them in its order, to replace those that were asked for. */
    if (getgroups(0, NULL) != (int)user.count) {
        errno = EPERM;
        fail("groups");
    }
}

/* The kernel drops the capabilities of a process that leaves user 0, unless securebits say otherwise. */
static void drop_capabilities(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    const struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) != 0 || syscall(SYS_capset, &header, none) != 0)
        fail("capabilities");
}

/* Otherwise the process would keep the daemon's keyring.  Containers often forbid the call, but then there are no
 * keys. */
static void join_keyring(void)
{
    if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS && errno != EPERM)
        fail("session keyring");
}

/* From now on its user may look into this process, so the daemon's log or terminal must not be open. */
static void close_standard(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0)
        fail("/dev/null");
    for (int fd = 0; fd < 3; fd++)
        if (dup3(null, fd, O_CLOEXEC) < 0)
            fail("/dev/null");
    close(null);
}

void eb_become(bool opens)
{
    if (user.given) {
        set_login_uid();
        if (setgroups(user.count, user.groups) != 0)
            fail("groups");
        if (setresgid(user.gid, user.gid, user.gid) != 0)
            fail("group");
        if (setresuid(user.uid, user.uid, user.uid) != 0)
            fail("user");
        check_ids();
        if (user.uid != 0)
            drop_capabilities();
        join_keyring();
        free(user.groups);
        user.groups = NULL;
    }
    if (user.directory != NULL && chdir(user.directory) != 0)
        fail(user.directory);
    if (user.given) {
        close_standard();
        /* As after an exec: a program that its user may not read stays closed to that user. */
        if (opens && access("/proc/self/exe", R_OK) == 0)
            (void)prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    }
}
