/* What a process passes on to the commands that it starts, read from the calling process and thread. */
#ifndef EB_STATE_H
#define EB_STATE_H

#include <sys/resource.h>
#include <sys/types.h>

#include "common/wire.h"

enum { EB_SIGNALS = 64 };

struct eb_state {
    uint64_t sigmask, sigign; /* bit n-1 for signal n */
    pid_t pgrp;
    int nice;
    struct rlimit rlimits[EB_MAX_RLIMITS]; /* by resource */
    uint32_t affinity_size;                /* 0 if the system has none */
    uint8_t affinity[EB_MAX_AFFINITY];
};

/* These fill `s`: the first its signals, the second the rest.  What can't be read, for instance because of a seccomp
 * filter, keeps its value. */
void eb_state_read_signals(struct eb_state *s);
void eb_state_read(struct eb_state *s);

#endif
