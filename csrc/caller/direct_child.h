#ifndef EB_DIRECT_CHILD_H
#define EB_DIRECT_CHILD_H

#include "spawn/spawn_job.h"

/* Parts with the maker's handlers and table of descriptors, as the job says.  Returns 0 or -errno. */
long eb_direct_first(struct eb_job *job);

#endif
