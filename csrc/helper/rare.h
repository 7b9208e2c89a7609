/* The code that most helpers use at most once. */
#ifndef EB_RARE_H
#define EB_RARE_H

/* Unmaps its pages from this process's memory: the kernel also maps pages around those that are executed, and counts
 * them as private if no other process has them.  Pages that are executed again come back by themselves. */
void eb_drop_rare_text(void);

#endif
