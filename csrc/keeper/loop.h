/* The epoll loop. */
#ifndef EB_KEEPER_LOOP_H
#define EB_KEEPER_LOOP_H

/* Serves until the job is over and its followers have been told.  `signals` is a signalfd. */
void eb_keeper_serve(int signals);

#endif
