/* Which frame may come from whom, and who acts on it. */
#ifndef EB_KEEPER_FRAMES_H
#define EB_KEEPER_FRAMES_H

#include "keeper/client.h"

/* Whether it is time for more of its frames. */
bool eb_client_takes_frames(const struct eb_client *c);
/* Acts on frames that have come whole, a bounded number at a time.  Returns whether there may be more. */
bool eb_client_take_frames(struct eb_client *c);

#endif
