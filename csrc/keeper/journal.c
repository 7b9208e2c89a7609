#include "keeper/journal.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

static int journal = -1;

void eb_journal_use(int fd)
{
    journal = fd;
}

void eb_journal_add(const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length < 0 || length >= (int)sizeof line - 1)
        return;
    line[length] = '\n';
    ssize_t written = write(journal, line, (size_t)length + 1);
    (void)written;
}
