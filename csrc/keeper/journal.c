#include "keeper/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RESERVED = 4 << 10 }; /* bytes */

static int journal = -1;

void eb_journal_use(int fd)
{
    journal = fd;
}

bool eb_journal_reserve(void)
{
    struct stat info;
    if (fstat(journal, &info) != 0)
        return false;
    /* A file system that can't reserve room is accepted: there may be enough. */
    return fallocate(journal, FALLOC_FL_KEEP_SIZE, info.st_size, RESERVED) == 0 || (errno != ENOSPC && errno != EDQUOT);
}

bool eb_journal_add(const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length < 0 || length >= (int)sizeof line - 1) {
        errno = EOVERFLOW;
        return false;
    }
    line[length] = '\n';
    const char *const end = line + length + 1;
    for (const char *at = line; at < end;) {
        ssize_t n = write(journal, at, (size_t)(end - at));
        if (n > 0)
            at += n;
        else if (n == 0 || errno != EINTR)
            return false;
    }
    return true;
}
