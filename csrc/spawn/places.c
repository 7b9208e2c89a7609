#include "spawn/places.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include "spawn/rawtext.h"

#include <errno.h>
#include <fcntl.h>

static EB_BARE long write_at(int directory, const char *name, const char *text, long size)
{
    long fd = eb_raw(SYS_openat, directory, (long)name, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return fd;
    long r = eb_raw(SYS_write, fd, (long)text, size, 0);
    eb_raw(SYS_close, fd, 0, 0, 0);
    return r < 0 ? r : 0;
}

static EB_BARE long map_id(const char *name, unsigned id)
{
    char text[32];
    int size = eb_write_number(text, id);
    size += eb_write_text(text + size, " ");
    size += eb_write_number(text + size, id);
    size += eb_write_text(text + size, " 1");
    return write_at(AT_FDCWD, name, text, size);
}

EB_BARE long eb_map_ids(uid_t user, gid_t group)
{
    /* A process may write these files about itself, so no other process has to, and none waits. The kernel accepts a
     * map of groups only if no group can be dropped afterwards, because a group may deny access to a file. */
    long r = write_at(AT_FDCWD, "/proc/self/setgroups", "deny", 4);
    if (r == 0)
        r = map_id("/proc/self/uid_map", user);
    if (r == 0)
        r = map_id("/proc/self/gid_map", group);
    return r;
}

EB_BARE long eb_join_cgroup(int directory)
{
    return write_at(directory, "cgroup.procs", "0", 1);
}

#endif
