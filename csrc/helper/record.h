/* What the report of a command's end tells the server, if it asked for that: what ran, and where. */
#ifndef EB_RECORD_H
#define EB_RECORD_H

#include "common/fdpass.h"
#include "spawn/request.h"

enum { EB_MOST_CWD = 1024, EB_MOST_ARGV = 2048 };

struct eb_record {
    uint32_t cwd_size, argv_size; /* of `text`: the directory, then the words of argv, each with its NUL; cut short */
    char text[];
};

/* Makes the record of a request that came with `fds`.  Allocated; NULL: memory is short. */
struct eb_record *eb_record_new(const struct eb_request *q, const struct eb_fds *fds);

#endif
