/* Clients that are attached to a job: their input, and the windows in which they see its terminal. */
#ifndef EB_ATTACH_H
#define EB_ATTACH_H

#include "keeper/client.h"

/* Called when the command begins; its terminal, if it has one, has this size. */
void eb_attach_begin(const struct winsize *size);
void eb_on_attach(struct eb_client *c, const struct eb_frame *frame);
void eb_on_window(struct eb_client *c, const struct eb_frame *frame);
void eb_on_typed(struct eb_client *c, const struct eb_frame *frame);
/* Writes as much of the typed input as the command takes. */
void eb_attach_write(void);
/* Whether some of that is left. */
bool eb_attach_has_typed(void);
/* Called when the command takes no more input. */
void eb_attach_end_input(void);
/* Called when a client has gone, or its window has changed: the terminal gets the smallest window of all. */
void eb_attach_fit(void);
/* Restores the terminal's size when that is due. */
void eb_attach_wake(uint64_t now);

#endif
