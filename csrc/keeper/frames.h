/* Decides who may send which frames, and what acts on them. */
#ifndef EB_KEEPER_FRAMES_H
#define EB_KEEPER_FRAMES_H

#include "keeper/client.h"

/* Whether the loop may take more of its frames. */
bool eb_client_takes_frames(const struct eb_client *c);
/* Acts on complete frames, a bounded number at a time.  Returns whether there may be more. */
bool eb_client_take_frames(struct eb_client *c);

#endif
