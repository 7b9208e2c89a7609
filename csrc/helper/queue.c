#include "helper/queue.h"

#include "helper/command.h"

#include <stddef.h>

/* When a client ends, its connections are closed one after another: a place that gets free by that is not given
 * before the others have been closed, too. */
enum { PAUSE_MS = 40 };

static struct eb_connection *first, **last = &first; /* of all queues, in the order of their requests */
static uint64_t resume_at;                           /* of eb_now_ms: when the pause ends; 0: there is none */

/* Returns whether there was one. */
static bool take_place(struct eb_connection *c)
{
    uint64_t taken = 0;
    for (const struct eb_connection *other = first; other != NULL; other = other->next_queued)
        if (other->queue == c->queue && other->place != 0)
            taken |= (uint64_t)1 << (other->place - 1);
    const int lowest = ~taken != 0 ? __builtin_ctzll(~taken) : EB_MAX_PLACES;
    if (lowest >= c->places)
        return false;
    c->place = (uint8_t)(lowest + 1);
    return true;
}

static void begin(struct eb_connection *c)
{
    if (!take_place(c))
        return;
    c->command->state = EB_REQUESTED;
    eb_mark(c);
}

void eb_queue_join(struct eb_connection *c)
{
    c->queue = c->command->request.queue;
    c->places = c->command->request.places;
    c->place = 0;
    c->next_queued = NULL;
    *last = c;
    last = &c->next_queued;
    if (!take_place(c))
        c->command->state = EB_WAITING;
}

void eb_queue_leave(struct eb_connection *c, bool closed)
{
    struct eb_connection **at = &first;
    const bool had_place = c->place != 0;
    if (c->places == 0)
        return;
    while (*at != c)
        at = &(*at)->next_queued;
    *at = c->next_queued;
    if (*at == NULL)
        last = at;
    c->places = c->place = 0;
    if (had_place && closed) {
        resume_at = eb_now_ms() + PAUSE_MS;
        eb_wake_by(resume_at);
        return;
    }
    for (struct eb_connection *next = first; had_place && next != NULL; next = next->next_queued)
        if (next->queue == c->queue && next->place == 0) {
            begin(next);
            return;
        }
}

void eb_queue_wake(uint64_t now)
{
    if (resume_at == 0)
        return;
    if (now < resume_at) {
        eb_wake_by(resume_at);
        return;
    }
    resume_at = 0;
    for (struct eb_connection *c = first; c != NULL; c = c->next_queued)
        if (c->place == 0)
            begin(c);
}
