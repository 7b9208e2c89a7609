#include "helper/record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static size_t append(char *text, size_t size, size_t most, const char *more, size_t length)
{
    if (length > most - size)
        length = most - size;
    memcpy(text + size, more, length);
    return size + length;
}

/* The directory as the request names it; empty if the kernel can't tell. */
static size_t read_cwd(const struct eb_request *q, const struct eb_fds *fds, char *cwd)
{
    char name[40] = "/proc/self/cwd";
    size_t size = 0;
    bool named = eb_has(q, EB_TAG_CWD);
    if (!named || q->cwd[0] != '/') {
        if (eb_has(q, EB_TAG_CWD_FD))
            (void)snprintf(name, sizeof name, "/proc/self/fd/%d",
                           fds->at[eb_request_fds(q) - eb_carried_before(q, EB_TAG_END)]);
        ssize_t n = readlink(name, cwd, EB_MOST_CWD);
        if (n < 0)
            return 0;
        size = (size_t)n;
        if (named)
            size = append(cwd, size, EB_MOST_CWD, "/", 1);
    }
    return named ? append(cwd, size, EB_MOST_CWD, q->cwd, strlen(q->cwd)) : size;
}

struct eb_record *eb_record_new(const struct eb_request *q, const struct eb_fds *fds)
{
    struct eb_record *record = malloc(sizeof *record + EB_MOST_CWD + EB_MOST_ARGV);
    if (record == NULL)
        return NULL;
    size_t cwd = read_cwd(q, fds, record->text), size = cwd;
    for (char **a = q->argv; *a != NULL; a++)
        size = append(record->text, size, cwd + EB_MOST_ARGV, *a, strlen(*a) + 1);
    record->cwd_size = (uint32_t)cwd;
    record->argv_size = (uint32_t)(size - cwd);
    struct eb_record *fitting = realloc(record, sizeof *record + size);
    return fitting != NULL ? fitting : record;
}
