/* What only the calling process can know or do: its own state, and starting the helper. */
#ifndef EB_CALLER_H
#define EB_CALLER_H

#include "state.h"

/* Who the calling thread is to the kernel.  Two equal ones may share a helper.  No padding: compared as
 * bytes. */
struct eb_identity {
    uint64_t capabilities[5]; /* inheritable, permitted, effective, bounding, ambient */
    uint64_t groups;          /* hash of the supplementary groups */
    uint32_t uids[4];         /* real, effective, saved, file system */
    uint32_t gids[4];
    int32_t no_new_privs, securebits, seccomp, seccomp_filters;
    int32_t pid, sid;
    int32_t complete;         /* 0: /proc could not be read, some of the above is not known */
    int32_t unused;           /* keeps the size a multiple of 8 */
};

struct eb_caller {
    struct eb_identity identity;
    rlim_t hard_limits[EB_MAX_RLIMITS];
    int32_t nice;
    uint32_t umask;
    uint32_t options_size;
    uint8_t options[2048]; /* SPAWN options: SIGMASK, SIGIGN, PGROUP, RLIMITS, NICE, AFFINITY */
    uint8_t *environment;  /* the C library's, as a SPAWN string list; allocated */
    size_t environment_size, environment_capacity;
};

enum {
    EB_RESTORE_SIGNALS = 1, /* SIGPIPE and SIGXFSZ are not ignored in the child */
    EB_WITH_PGROUP = 2,     /* PGROUP with the caller's process group */
    EB_WITH_UMASK = 4,      /* read the umask, which costs a moment of race where /proc does not tell it */
};

/* NULL if memory is short. */
struct eb_caller *eb_caller_new(void);
void eb_caller_free(struct eb_caller *c);

/* What eb_caller_read found out. */
enum {
    EB_STDIN = 1, /* descriptors 0 to 2: open, and inheritable */
    EB_STDOUT = 2,
    EB_STDERR = 4,
    EB_FITS = 8,        /* a command started by the helper is what the caller would start */
    EB_CONNECTION = 16, /* the connection's descriptor still is what it was */
    EB_UNSURE = 32,     /* EB_FITS, but another seccomp filter would not have been noticed */
};

/*
 * Fills `c` for the calling thread.  `start` is what was read by the thread that started the helper, or
 * NULL; `helper` the helper's pid if it shares the working directory, root and umask of that thread, or
 * 0.  `fd` is the connection to be used, with the device and inode that it had when it was made, or -1.
 * Returns what was found out, or -errno.
 */
int eb_caller_read(struct eb_caller *c, const struct eb_caller *start, int helper, int flags, int fd,
                   uint64_t device, uint64_t inode);

/*
 * Reads the environment into `c`.  Returns 0 or ENOMEM.  os.putenv moves it under the GIL, so this must be
 * called under the GIL.
 */
int eb_caller_read_environment(struct eb_caller *c);

/*
 * Starts the program behind the O_PATH descriptor `program`, or if that is -1 `path`, as a helper whose descriptor 3 is `control`, with the NULL-terminated
 * `arguments`.  The calling process is not copied.  With `*share_fs`, the helper shares this process's
 * working directory, root and umask; cleared if the kernel refuses that.  Returns the helper's pid,
 * or -errno.
 */
int eb_start_helper(int program, const char *path, char **arguments, int control, int *share_fs);

#endif
