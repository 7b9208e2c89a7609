#ifndef EB_DESCRIPTOR_H
#define EB_DESCRIPTOR_H

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* Returns `fd`, which may be -1; in place of 0, 1 or 2 a close-on-exec copy from 3 on, or -1 with errno.  What a program
 * or its commands write to a standard stream that is closed must not reach a descriptor of ours. */
static inline int eb_above_standard(int fd)
{
    if (fd < 0 || fd > 2)
        return fd;
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3), error = errno;
    close(fd);
    errno = error;
    return copy;
}

#endif
