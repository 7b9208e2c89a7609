/* Decides which frames may come when, and what handles them. */
#ifndef EB_FRAMES_H
#define EB_FRAMES_H

#include "helper/connection.h"

/* Handles the first frame, or the NUL byte before all frames; false if it is not complete, or was refused. */
bool eb_take_frame(struct eb_connection *c);

#endif
