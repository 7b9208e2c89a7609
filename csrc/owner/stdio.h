/* Makes the standard streams that a request asks for: pipes, a terminal, /dev/null. */
#ifndef EB_STDIO_H
#define EB_STDIO_H

#include "common/fdpass.h"
#include "spawn/request.h"

/* Makes the pipes and the terminal that STREAMS and TERMINAL name: our ends, which don't block, and the command's;
 * stores -1 for other descriptors.  False: see errno; descriptors opened so far are stored. */
bool eb_stdio_open(const struct eb_request *q, int ours[3], int theirs[3]);
/* Gives each target of the request its source: a descriptor that was sent, one of these ends, or `null`, /dev/null. */
void eb_stdio_place(struct eb_request *q, const struct eb_fds *sent, const int theirs[3], int null);
void eb_stdio_close(int fds[3]);

#endif
