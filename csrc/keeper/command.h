/* The job's command, from the request to the end of its process. */
#ifndef EB_KEPT_COMMAND_H
#define EB_KEPT_COMMAND_H

#include "keeper/client.h"

void eb_kept_spawn(struct eb_client *c, const struct eb_frame *frame);
void eb_kept_signal(struct eb_client *c, const struct eb_frame *frame);
/* Called when the outcome of its start is known. */
void eb_kept_started(void);
/* Reads its output, a bounded part at a time. */
void eb_kept_read(int number);
/* Waits for the processes that have ended. */
void eb_kept_reap(void);
/* Lets reading go on when that is due. */
void eb_kept_wake(uint64_t now);

#endif
