#include "spawn/slices.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <sched.h>

enum {
    SLICE_NS = 100 * 1000,
    RESET_ON_FORK = 1, /* SCHED_FLAG_RESET_ON_FORK */
};

EB_BARE void eb_shorten_slices(void)
{
    struct sched_attributes {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attributes;
    if (eb_raw(SYS_sched_getattr, 0, (long)&attributes, sizeof attributes, 0) != 0 ||
        attributes.policy != SCHED_OTHER || attributes.nice < 0)
        return;
    attributes.flags |= RESET_ON_FORK;
    attributes.runtime = SLICE_NS;
    eb_raw(SYS_sched_setattr, 0, (long)&attributes, 0, 0);
}

#else

void eb_shorten_slices(void)
{
}

#endif
