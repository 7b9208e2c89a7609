/* The epoll loop: what comes is handed down, and what that has marked is done. */
#ifndef EB_LOOP_H
#define EB_LOOP_H

/* Serves until nothing is left to do.  `signals` is a signalfd, `caller` the caller's pidfd or -1.  Does not return when
 * the caller has ended. */
void eb_serve(int signals, int caller);

#endif
