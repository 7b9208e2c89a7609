/* The new process's capabilities, before and after its ids change. */
#ifndef EB_CHILD_CAPABILITIES_H
#define EB_CHILD_CAPABILITIES_H

#include "spawn/spawn_job.h"

/* Removes from the bounding set the capabilities that are not to be kept, and has a process that changes its user
 * keep the others until the next call.  Returns 0 or -errno, with the capability in `member`. */
long eb_bound_capabilities(struct eb_job *job);
/* Gives the kept capabilities to the process and, through the ambient set, to the program.  Returns 0 or -errno. */
long eb_set_capabilities(struct eb_job *job);

#endif
