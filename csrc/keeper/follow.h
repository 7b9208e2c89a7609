/* Sends followers pieces of a job's output, and its end. */
#ifndef EB_FOLLOW_H
#define EB_FOLLOW_H

#include "keeper/client.h"

void eb_on_follow(struct eb_client *c, const struct eb_frame *frame);
/* Sends a client what there is for it, a bounded part at a time.  Returns whether there is more. */
bool eb_follow(struct eb_client *c);
/* The same for all clients. */
void eb_follow_all(void);

#endif
