/* The frames between a daemon's server and its helper, and from a private helper to its caller. */
#ifndef EB_CONTROL_H
#define EB_CONTROL_H

#include "helper/command.h"

void eb_on_adopt(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_drain(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_end(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_query(struct eb_connection *control, const struct eb_frame *frame);
void eb_on_grant(struct eb_connection *control, const struct eb_frame *frame);

/* Stops taking commands: has the loop close idle connections, and the others when they become idle. */
void eb_drain(void);
/* Called at the end of the control socket. */
void eb_server_gone(void);

/* Sends the server WANT, DONE or CLOSED for a connection. */
void eb_tell(enum eb_kind kind, uint32_t id);
/* Sends ENDED for a command that has a record. */
void eb_tell_end(const struct eb_command *k);
/* Sends FULL or STAYS, which have no payload, to the server, or from a private helper to its caller. */
void eb_tell_empty(enum eb_kind kind);
/* Sends IDS, the ids of this process; false if memory is short. */
bool eb_tell_ids(void);

#endif
