/* Which frame may come when, and who acts on it. */
#ifndef EB_FRAMES_H
#define EB_FRAMES_H

#include "helper/connection.h"

/* Acts on the first frame, or on the NUL byte before all; false: it has not come whole, or was refused. */
bool eb_take_frame(struct eb_connection *c);

#endif
