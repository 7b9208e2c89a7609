/* Clients that are attached to a job: what they type, and the windows in which they see its terminal. */
#ifndef EB_ATTACH_H
#define EB_ATTACH_H

#include "keeper/client.h"

/* A command begins, whose terminal, if it has one, has this size. */
void eb_attach_begin(const struct winsize *size);
void eb_on_attach(struct eb_client *c, const struct eb_frame *frame);
void eb_on_window(struct eb_client *c, const struct eb_frame *frame);
void eb_on_typed(struct eb_client *c, const struct eb_frame *frame);
/* Writes what has been typed, as much as the command takes. */
void eb_attach_write(void);
/* Whether some of it is left. */
bool eb_attach_has_typed(void);
/* The command takes no input any more. */
void eb_attach_end_input(void);
/* One of them has gone, or its window has changed: the terminal gets the smallest of all. */
void eb_attach_fit(void);
/* Does what is due. */
void eb_attach_wake(uint64_t now);

#endif
