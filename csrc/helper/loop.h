/* The epoll loop: hands events down to their owners, and acts on the marks that these leave. */
#ifndef EB_LOOP_H
#define EB_LOOP_H

/* Serves until nothing is left to do.  `signals` is a signalfd, `caller` the caller's pidfd or -1.  Does not return
 * if the caller has ended. */
void eb_serve(int signals, int caller);

#endif
