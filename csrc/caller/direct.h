/*
 * Starts a command as a child of the calling process, which may have threads and signal handlers.
 * Any thread may call these functions, also in a process that was forked in the middle of one.
 */
#ifndef EB_DIRECT_H
#define EB_DIRECT_H

#include "caller/spawn_frame.h"
#include "spawn/request.h"

struct eb_direct {
    struct eb_spawn_frame frame; /* read by the child, as is the next */
    struct eb_request q;         /* parsed */
    int flags;
    struct eb_job *job;
    struct eb_direct *next;
    pid_t maker; /* the process that began the start; in a process forked since, this is a dead copy */
    /* The start's outcome, once it is decided. */
    pid_t pid; /* the process to be waited for; 0: there is none */
    int error; /* 0: the program runs */
    enum eb_stage stage;
    uint8_t member; /* as in FAILED */
};

enum {
    EB_KEEP_FILES = 512, /* the child gets all inheritable descriptors */
    EB_OWN_STDIN = 1024, /* the child's 0, 1 or 2 is Popen's own pipe or /dev/null, which nothing else uses */
    EB_OWN_STDOUT = 2048,
    EB_OWN_STDERR = 4096,
};

/* Whether direct starts work here: Linux 5.9 on a known architecture, and no filter that refuses the calls. */
bool eb_direct_works(void);

/* Returns a start to begin; NULL if memory is short. */
struct eb_direct *eb_direct_take(void);
/* Releases a start, even while it is pending: the child goes on, and the caller must wait for it. */
void eb_direct_give(struct eb_direct *d);

/*
 * Makes the process.  `flags`, `options`, `wanted` and the GIL are as for eb_spawn_frame_build.  Returns 0 if the start
 * is pending, otherwise it is decided.  If the kernel or a filter lacks what is needed, it fails with ENOSYS in the
 * stage EB_STAGE_START, and no program has run.
 */
int eb_direct_begin(struct eb_direct *d, int flags, const uint8_t *options, size_t size,
                    const struct eb_wanted_fds *wanted);

/* Waits for the process of a start that has failed. */
void eb_direct_reap(struct eb_direct *d);

/* Waits for the outcome.  Returns 1 if the start is decided; 0 if the time is up or a signal has come. */
int eb_direct_wait(struct eb_direct *d, uint32_t microseconds);

#endif
