#include "spawn/child_capabilities.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <linux/capability.h>
#include <sys/prctl.h>

enum { MOST = 64 }; /* capabilities; Linux 6.18 has 41, and refuses the number after its last */

EB_BARE long eb_bound_capabilities(struct eb_job *job)
{
    for (int n = 0; n < MOST; n++) {
        long r = eb_raw5(SYS_prctl, PR_CAPBSET_READ, n, 0, 0, 0);
        if (r < 0)
            break;
        if (r == 0 || (job->q->capabilities >> n & 1) != 0)
            continue;
        job->member = (uint8_t)n;
        if ((r = eb_raw5(SYS_prctl, PR_CAPBSET_DROP, n, 0, 0, 0)) < 0)
            return r;
    }
    return eb_has(job->q, EB_TAG_UID) ? eb_raw5(SYS_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0) : 0;
}

EB_BARE long eb_set_capabilities(struct eb_job *job)
{
    const uint64_t kept = job->q->capabilities;
    const uint32_t low = (uint32_t)kept, high = (uint32_t)(kept >> 32);
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    const struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {
        {.effective = low, .permitted = low, .inheritable = low},
        {.effective = high, .permitted = high, .inheritable = high},
    };
    long r = eb_raw(SYS_capset, (long)&header, (long)data, 0, 0);
    if (r == 0)
        r = eb_raw5(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (int n = 0; n < MOST && r == 0; n++)
        if (kept >> n & 1) {
            job->member = (uint8_t)n;
            r = eb_raw5(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, n, 0, 0);
        }
    return r;
}

#endif
