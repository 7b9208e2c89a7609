/*
 * Commands that are requested ahead.  Those of one queue (QUEUE) share a number of places: a command that finds none
 * waits, and is begun when the connection of another is at rest, so that no time passes until its client knows.
 *
 * A connection is in the queue that its request names, and has its command's place, until it is at rest or closed.
 */
#ifndef EB_QUEUE_H
#define EB_QUEUE_H

#include "helper/connection.h"

/* For a connection whose command has just been requested: without a place, the command is WAITING. */
void eb_queue_join(struct eb_connection *c);
/* It is at rest, and its place is free; or it is about to be `closed`.  It may have been in no queue. */
void eb_queue_leave(struct eb_connection *c, bool closed);
/* Gives the places of those that were closed, when it is time. */
void eb_queue_wake(uint64_t now);

#endif
