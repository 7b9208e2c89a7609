/* A SPAWN payload, checked and parsed. */
#ifndef EB_REQUEST_H
#define EB_REQUEST_H

#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "common/wire.h"

/* 0: none. */
struct eb_limits {
    uint64_t wall_us, cpu_us, memory;
    uint32_t processes;
};

struct eb_request {
    uint64_t present; /* bit per eb_tag, see eb_has */
    /* The three lists are NULL-terminated; the strings stay in the payload, which must outlive this. */
    char **executables, **argv, **env;
    char **strings; /* the one allocation that holds them */
    int *targets;   /* allocated */
    uint32_t target_count;
    int *sources; /* allocated, for eb_request_sources descriptors; the spawner may change them */
    const char *cwd, *root;
    mode_t umask;
    uint64_t sigmask, sigign, sigdefault;
    pid_t pgroup;
    struct rlimit rlimits[EB_MAX_RLIMITS]; /* by resource, */
    uint16_t limited;                      /* a bit for each resource with a limit, */
    uint16_t set_limits;                   /* and for each whose limit is one of SET_RLIMITS */
    rlim_t nproc;                          /* the soft limit of RLIMITS, under which the process must be made */
    int nice, renice;
    const uint8_t *affinity;
    uint32_t affinity_size;
    gid_t *groups; /* allocated */
    uint32_t group_count;
    gid_t gid;
    uid_t uid;
    struct winsize size;    /* of the terminal that the helper makes, */
    uint8_t terminal;       /* and its enum eb_terminal */
    uint8_t streams, nulls; /* bit per descriptor of 0 to 2; they are among the targets */
    uint32_t on_close_ms;
    uint32_t namespaces;       /* of EB_NAMESPACES */
    uint8_t sockets;           /* enum eb_sockets */
    uint32_t policy, priority; /* of SCHEDULER */
    uint32_t ionice;
    int oom_score_adj;
    uint64_t timer_slack, capabilities;
    bool tree_all; /* of SUPERVISE */
    uint32_t drain_ms;
    struct eb_limits limits;
    uint32_t queue;
    uint8_t places;
};

/* Flags of clone(2): namespaces of mounts, cgroups, host names, System V IPC, users, processes and networks. */
#define EB_NAMESPACES (0x00020000u | 0x02000000u | 0x04000000u | 0x08000000u | 0x10000000u | 0x20000000u | 0x40000000u)
#define EB_NEW_USER 0x10000000u

static inline bool eb_has(const struct eb_request *q, enum eb_tag tag)
{
    return (q->present >> tag & 1) != 0;
}

static inline bool eb_limits(const struct eb_request *q, int resource)
{
    return (q->limited >> resource & 1) != 0;
}

static inline bool eb_same_limit(const struct rlimit *a, const struct rlimit *b)
{
    return a->rlim_cur == b->rlim_cur && a->rlim_max == b->rlim_max;
}

_Static_assert(EB_TAG_END <= 64, "`present` has a bit for each tag");
_Static_assert(EB_MAX_RLIMITS <= 16, "`limited` has a bit for each resource");

/* Tags that carry a descriptor. */
#define EB_CARRIERS                                                                                             \
    ((uint64_t)1 << EB_TAG_CWD_FD | (uint64_t)1 << EB_TAG_CONTROLLING_TERMINAL | (uint64_t)1 << EB_TAG_CGROUP | \
     (uint64_t)1 << EB_TAG_SANDBOX)

/* How many descriptors the tags below `end` carry. */
static inline uint32_t eb_carried_before(const struct eb_request *q, enum eb_tag end)
{
    uint32_t count = 0;
    for (uint64_t left = q->present & EB_CARRIERS & (((uint64_t)1 << end) - 1); left != 0; left &= left - 1)
        count++;
    return count;
}

/* The descriptor that `tag` carries.  Also called between clone and exec. */
static inline int eb_carried(const struct eb_request *q, enum eb_tag tag)
{
    return q->sources[q->target_count + eb_carried_before(q, tag)];
}

/* The number of `sources`: one for each target, then those that tags carry. */
static inline uint32_t eb_request_sources(const struct eb_request *q)
{
    return q->target_count + eb_carried_before(q, EB_TAG_END);
}

/* Which of the descriptors 0 to 2 the helper makes, a bit for each. */
static inline unsigned eb_made(const struct eb_request *q)
{
    return (q->streams & 7u) | (q->streams & EB_JOINED ? 4u : 0) | q->nulls;
}

static inline bool eb_is_made(const struct eb_request *q, int target)
{
    return target < 3 && (eb_made(q) >> target & 1) != 0;
}

/* The number of descriptors that come with the request. */
static inline uint32_t eb_request_fds(const struct eb_request *q)
{
    unsigned made = eb_made(q);
    return eb_request_sources(q) - (made & 1) - (made >> 1 & 1) - (made >> 2 & 1);
}

/* Whether the child is to have a descriptor `fd`.  Also called between clone and exec. */
bool eb_is_target(const struct eb_request *q, long fd);

/*
 * Reads `payload`.  Returns 0; or an errno with which the start fails (E2BIG, ENOMEM); or -1 if the payload is
 * malformed, with the reason in `reason` (EB_MAX_REASON bytes).  Call eb_request_free in each case.
 */
int eb_request_parse(struct eb_request *q, const uint8_t *payload, size_t size, char *reason);
void eb_request_free(struct eb_request *q);

#endif
