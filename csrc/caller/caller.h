/* What only the calling process can find out: its own state, and whether a helper still fits it. */
#ifndef EB_CALLER_H
#define EB_CALLER_H

#include "common/state.h"

/* The kernel's view of who the calling thread is.  Threads with equal identities may share a helper.  There is no
 * padding, because identities are compared as bytes. */
struct eb_identity {
    uint64_t capabilities[5]; /* inheritable, permitted, effective, bounding, ambient */
    uint64_t groups;          /* hash of the supplementary groups */
    uint32_t uids[4];         /* real, effective, saved, file system */
    uint32_t gids[4];
    int32_t no_new_privs, securebits, seccomp, seccomp_filters;
    int32_t pid, sid;
    int32_t complete; /* 0: /proc could not be read, so some members are not known */
    int32_t unused;   /* keeps the size a multiple of 8 */
};

struct eb_caller {
    struct eb_identity identity;
    struct eb_state state;
    uint32_t umask;
    uint64_t root_device, root_inode; /* 0: not read */
    int status_fd;                    /* see caller.c */
    pid_t status_thread;
    uint64_t status_device, status_inode;
};

enum {
    EB_WITH_UMASK = 1,  /* read the umask; if /proc does not have it, with a short race */
    EB_WITH_ROOT = 256, /* read which directory is the root, to compare it later */
};

/* The results of eb_caller_read. */
enum {
    EB_HAS_STDIN = 1, /* descriptors 0 to 2: open, and inheritable */
    EB_HAS_STDOUT = 2,
    EB_HAS_STDERR = 4,
    EB_FITS = 8,        /* a command started by the helper would be the same as one started by the caller */
    EB_CONNECTION = 16, /* the connection's descriptor still belongs to the same socket */
    EB_UNSURE = 32,     /* EB_FITS, but another seccomp filter would not have been noticed */
};

/* NULL if memory is short. */
struct eb_caller *eb_caller_new(void);
void eb_caller_free(struct eb_caller *c);

/* Replaces eb_caller_new for one inside another object. */
void eb_caller_init(struct eb_caller *c);
/* Releases what is kept only for the next eb_caller_read. */
void eb_caller_close(struct eb_caller *c);

/* Returns which of EB_HAS_STDIN and the two flags after it hold in the calling process now. */
int eb_standard_fds(void);

/*
 * Fills `c` for the calling thread.  `start` is what was read by the thread that started the helper, or NULL; `helper`
 * is the helper's pid if it shares the working directory, root and umask of that thread; with 0, the root must be the
 * same as at the start.  `fd` is the connection to be used, with the device and inode that it had when it was made, or
 * -1.  Returns what was found out, or -errno.
 */
int eb_caller_read(struct eb_caller *c, const struct eb_caller *start, int helper, int flags, int fd, uint64_t device,
                   uint64_t inode);

#endif
