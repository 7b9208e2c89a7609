/* A command that is run when the job is over. */
#ifndef EB_NOTIFY_H
#define EB_NOTIFY_H

#include "keeper/client.h"

void eb_on_notify(struct eb_client *c, const struct eb_frame *frame);
/* Starts the command, if there is one, and tells it the exit status as a shell has it, and the cause of the end. */
void eb_notify_begin(int status, const char *cause);
/* A descriptor that hangs up when the outcome is known; -1: there is nothing to wait for. */
int eb_notify_fd(void);
void eb_notify_started(void);

#endif
