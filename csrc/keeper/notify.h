/* A command that is run when the job is over. */
#ifndef EB_NOTIFY_H
#define EB_NOTIFY_H

#include "keeper/client.h"

void eb_on_notify(struct eb_client *c, const struct eb_frame *frame);
/* Starts it, if there is one.  It is told the exit status as a shell has it, and the cause of the end. */
void eb_notify_begin(int status, const char *cause);
/* Polls as hung up when its outcome is known; -1: there is none to wait for. */
int eb_notify_fd(void);
void eb_notify_started(void);

#endif
