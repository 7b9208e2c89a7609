/* What a daemon's server and its helper tell each other, and what a private helper tells its caller. */
#ifndef EB_CONTROL_H
#define EB_CONTROL_H

#include "helper/command.h"

void eb_on_adopt(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_drain(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_end(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_query(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_grant(struct eb_connection *control, const struct eb_frame *frame);

/* Takes no command any more: has the loop close the connections that are at rest, and the others when they are. */
void eb_drain(void);
/* The control socket is at its end. */
void eb_server_gone(void);

/* Tells the server something of a connection; WANT, DONE or CLOSED. */
void eb_tell(enum eb_kind kind, uint32_t id);
/* Tells it of the end of a command that has a record. */
void eb_tell_end(const struct eb_command *k);
/* Tells it something without a payload, and so does a private helper its caller; FULL or STAYS. */
void eb_tell_empty(enum eb_kind kind);
/* Tells the caller whose rights this process has; false if memory is short. */
bool eb_tell_ids(void);

#endif
