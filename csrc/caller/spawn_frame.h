/* Builds a SPAWN request on the caller's side: the options, and the state that the child inherits. */
#ifndef EB_SPAWN_FRAME_H
#define EB_SPAWN_FRAME_H

#include <stddef.h>

#include "caller/caller.h"

struct eb_spawn_frame {
    struct eb_caller caller;
    uint8_t *frame; /* the whole frame; allocated */
    size_t size, capacity;
    size_t sent; /* bytes of it that eb_spawn_frame_send has sent; the descriptors go with the first ones */
    int *fds;    /* to be sent with it: those for 0 to 2, `others`, cwd_fd, `carried`; of these, only cwd_fd is closed
                    here */
    uint32_t fd_count, fd_capacity;
    int cwd_fd; /* one of them, or -1 */
};

enum {
    EB_RESTORE_SIGNALS = 2,    /* SIGPIPE and SIGXFSZ are not ignored in the child */
    EB_WITH_PGROUP = 4,        /* the child joins the caller's process group */
    EB_WITH_ENVIRONMENT = 8,   /* the child has the C library's environment */
    EB_WITH_CWD = 16,          /* the caller's working directory is sent as a descriptor */
    EB_WITHOUT_STATE = 256,    /* the child is this process's own, and inherits its state */
    EB_WITHOUT_STANDARD = 128, /* of 0 to 2, the child gets only those that `standard` gives it */
    EB_SENT = 64,              /* added to the results of eb_caller_read: the whole frame has been sent, and released */
};

/* With each send; one fewer than the kernel takes, since musl's sendmsg has room for no more, and fails with ENOMEM. */
enum { EB_MOST_FDS_SENT = 252 };

/* The child's descriptors.  `standard`: ours for 0 to 2, or -1 to inherit that one if it is open and inheritable;
 * `others`: ascending, those that keep their numbers; `carried`: those that the options carry, in the order of their
 * tags. */
struct eb_wanted_fds {
    int standard[3];
    const int *others, *carried;
    uint32_t other_count, carried_count;
};

/* NULL if memory is short. */
struct eb_spawn_frame *eb_spawn_frame_new(void);
void eb_spawn_frame_free(struct eb_spawn_frame *o);

/* Replace these two for one inside another object; `o` must be all zeros before. */
void eb_spawn_frame_init(struct eb_spawn_frame *o);
void eb_spawn_frame_clear(struct eb_spawn_frame *o);

/*
 * Builds the frame, after eb_caller_read has filled `caller` and returned `found`.  `options` are those that the caller
 * has encoded itself, and override its state.  Returns 0, E2BIG, ENOMEM, the errno of opening the working directory, or
 * EAGAIN if other threads do not stop adding to the environment.  With EB_WITH_ENVIRONMENT, call it under the GIL,
 * under which os.putenv moves the environment; without a GIL, `options` have the environment.
 */
int eb_spawn_frame_build(struct eb_spawn_frame *o, int found, int flags, const uint8_t *options, size_t options_size,
                         const struct eb_wanted_fds *wanted);

/* Sends as much of the frame as the socket takes without waiting; with up to EB_MOST_FDS_SENT descriptors. */
void eb_spawn_frame_send(struct eb_spawn_frame *o, int fd);

/* Releases what only this request needed. */
void eb_spawn_frame_done(struct eb_spawn_frame *o);

#endif
