/* What a tree of processes uses, as counted by its supervisor, and whether that exceeds its limits. */
#ifndef EB_WATCH_H
#define EB_WATCH_H

#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "spawn/request.h"

struct eb_watch {
    struct eb_limits limits;
    unsigned cpus;        /* that the tree can use at the same time */
    uint64_t begun_ns;    /* of CLOCK_MONOTONIC */
    uint64_t next_ns;     /* when to look again */
    uint64_t cpu_us;      /* of the whole tree, including processes that have been waited for; in steps of 10,000 */
    uint64_t peak_memory; /* bytes, the most that a look has found */
    uint32_t peak_processes;
    pid_t found[EB_MAX_PROCESSES]; /* by the current look */
};

/* Pages of its own, for munmap; or NULL. */
struct eb_watch *eb_watch_new(const struct eb_limits *limits);

/* In the supervisor, whose children are the tree: looks at the tree, if that is due.  Returns the limit that is
 * exceeded, or EB_CAUSE_NONE; then `*pause_ns` is the time to the next look. */
enum eb_cause eb_watch_look(struct eb_watch *w, int64_t *pause_ns);

/* The same for what has been used in the end. */
enum eb_cause eb_watch_conclude(const struct eb_watch *w, const struct rusage *tree);

static inline uint64_t eb_watch_us(const struct timeval *t)
{
    return (uint64_t)t->tv_sec * 1000000 + (uint64_t)t->tv_usec;
}

#endif
