#include "keeper/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_ROTATED = 1000, MOST_SUFFIX = 8 };

static const char *path; /* NULL: there is none */
static uint64_t most;    /* bytes; 0: no limit */
static unsigned long rotated = 5;
static int fd = -1;
static bool regular;
static uint64_t size, lost;
static int told; /* errno */

bool eb_log_option(const char *argument)
{
    if (strncmp(argument, "--log=", 6) == 0)
        path = argument + 6;
    else if (strncmp(argument, "--log-size=", 11) == 0)
        most = strtoull(argument + 11, NULL, 10);
    else if (strncmp(argument, "--log-count=", 12) == 0)
        rotated = strtoul(argument + 12, NULL, 10);
    else
        return false;
    if (rotated > MOST_ROTATED)
        rotated = MOST_ROTATED;
    return true;
}

/* A FIFO without a reader is refused; one whose reader is slow loses output for which it has no room. */
static bool open_file(int flags)
{
    struct stat info;
    int opened = open(path, O_WRONLY | O_APPEND | O_CREAT | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | flags, 0666);
    if (opened < 0)
        return false;
    if (fstat(opened, &info) != 0) {
        int error = errno;
        close(opened);
        errno = error;
        return false;
    }
    if (fd >= 0)
        close(fd);
    fd = opened;
    regular = S_ISREG(info.st_mode);
    size = (uint64_t)info.st_size;
    return true;
}

bool eb_log_open(void)
{
    return path == NULL || open_file(0);
}

/* FILE.2 becomes FILE.3, FILE.1 becomes FILE.2, FILE becomes FILE.1.  If that fails, FILE goes on. */
static bool rotate(void)
{
    if (rotated == 0)
        return open_file(O_TRUNC);
    const size_t room = strlen(path) + MOST_SUFFIX;
    char *from = malloc(2 * room), *to = from + room;
    if (from == NULL)
        return false;
    bool done = true;
    for (unsigned long i = rotated; i > 0 && done; i--) {
        (void)snprintf(from, room, i > 1 ? "%s.%lu" : "%s", path, i - 1);
        (void)snprintf(to, room, "%s.%lu", path, i);
        done = rename(from, to) == 0 || errno == ENOENT;
    }
    int error = errno;
    free(from);
    errno = error;
    return done && open_file(0);
}

static int tell(int error)
{
    if (error == told)
        return 0;
    return told = error;
}

int eb_log_add(const uint8_t *data, size_t count)
{
    int error = 0;
    if (fd < 0)
        return 0;
    if (regular && most != 0 && size > 0 && size + count > most && !rotate()) {
        error = errno;
        size = 0; /* try again after as many bytes */
    }
    while (count > 0) {
        ssize_t n = write(fd, data, count);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            error = n < 0 ? errno : EIO;
            lost += count;
            break;
        }
        size += (uint64_t)n;
        data += n;
        count -= (size_t)n;
    }
    return error != 0 ? tell(error) : 0;
}

const uint64_t *eb_log_lost(void)
{
    return path != NULL ? &lost : NULL;
}
