/* The new process's capabilities, before and after its ids change. */
#ifndef EB_CHILD_CAPABILITIES_H
#define EB_CHILD_CAPABILITIES_H

#include "spawn/spawn_job.h"

/* Takes what is not to be kept from the bounding set, and sees to it that another user's process keeps the rest up to
 * the next call.  Returns 0 or -errno, with the capability in `member`. */
long eb_bound_capabilities(struct eb_job *job);
/* Gives the process those that are kept, and by the ambient set also the program.  Returns 0 or -errno. */
long eb_set_capabilities(struct eb_job *job);

#endif
