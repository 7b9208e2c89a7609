/* The descendants of the calling process, found in /proc.  Raw system calls only. */
#ifndef EB_PROCTREE_H
#define EB_PROCTREE_H

#include <stdbool.h>
#include <sys/types.h>

/* Whether /proc belongs to this process's PID namespace, and lists children. */
bool eb_tree_can_be_read(void);
/* Kills all descendants; with `again`, those that survived the first call, because they keep making new ones.
 * Returns false if this process may not kill those that are left. */
bool eb_tree_kill(bool again);
/* Sends a signal to all descendants, to children before their parents. */
void eb_tree_signal(int number);

#endif
