/* The descendants of the calling process, by /proc.  Raw system calls only. */
#ifndef EB_PROCTREE_H
#define EB_PROCTREE_H

#include <stdbool.h>
#include <sys/types.h>

/* Whether /proc is that of this process's PID namespace, and lists children. */
bool eb_tree_can_be_read(void);
/* Kills all descendants; with `again`, those that the first call has left, which make new ones all the time.  Returns
 * false if those that are left may not be killed. */
bool eb_tree_kill(bool again);
/* Sends a signal to all descendants, those below before those above. */
void eb_tree_signal(int number);

#endif
