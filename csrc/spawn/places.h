/* Where a new process starts: its namespaces and its cgroup. */
#ifndef EB_PLACES_H
#define EB_PLACES_H

#include <sys/types.h>

/* In a process that was made with CLONE_NEWUSER: maps its outer user and group to the same numbers. Returns 0 or
 * -errno: EPERM or EACCES if that is not allowed. */
long eb_map_ids(uid_t user, gid_t group);

/* In the new process: joins the cgroup whose directory is open as `directory`.  Returns 0 or -errno. */
long eb_join_cgroup(int directory);

#endif
