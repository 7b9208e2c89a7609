/* What followers are sent of a job: pieces of its output, and its end. */
#ifndef EB_FOLLOW_H
#define EB_FOLLOW_H

#include "keeper/client.h"

void eb_on_follow(struct eb_client *c, const struct eb_frame *frame);
/* Sends what there is for it, and a bounded part of it at a time.  Returns whether there is more. */
bool eb_follow(struct eb_client *c);
/* The same for all. */
void eb_follow_all(void);

#endif
