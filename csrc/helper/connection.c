#include "helper/connection.h"

#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    CORK_MS = 10,
    MOST_CORKED = 32 << 10, /* bytes */
    GRAIN_MS = 4,           /* wakes are put off to multiples of this, so that most are for several objects */
};

struct eb_helper helper;

void eb_wake_by(uint64_t when)
{
    uint64_t wake = (when / GRAIN_MS + 1) * GRAIN_MS;
    if (helper.next_wake == 0 || wake < helper.next_wake)
        helper.next_wake = wake;
}

/* -- marks -- */

void eb_mark(struct eb_connection *c)
{
    if (c->marked || c->channel.fd < 0)
        return;
    c->marked = true;
    c->next_marked = NULL;
    *(helper.marked == NULL ? &helper.marked : helper.marked_end) = c;
    helper.marked_end = &c->next_marked;
}

void eb_mark_closing(struct eb_connection *c)
{
    c->closing = true;
    eb_mark(c);
}

/* -- beginning and end -- */

struct eb_connection *eb_connection_new(int fd, uint32_t id, uint8_t flags, bool control)
{
    struct eb_connection *c = malloc(sizeof *c);
    if (c == NULL) {
        close(fd);
        return NULL;
    }
    *c = (struct eb_connection){
        .source = EB_SOURCE_CONNECTION,
        .stream_sources = {EB_SOURCE_STDIN, EB_SOURCE_STDOUT, EB_SOURCE_STDERR},
        .channel.fd = fd,
        .id = id,
        .control = control,
        .asks = (flags & EB_ASK) != 0,
        .tells_ends = helper.pool && (flags & EB_TELL_ENDS) != 0,
        .only = helper.pool ? NULL : &helper.caller,
        .next = helper.connections,
    };
    if (c->next != NULL)
        c->next->previous = c;
    helper.connections = c;
    eb_mark(c);
    if (control)
        return helper.control = c;
    helper.count++;
    eb_reply_u32(c, EB_HELLO, EB_VERSION);
    return c;
}

void eb_connection_close(struct eb_connection *c)
{
    eb_channel_close(&c->channel);
    free(c->spare);
    c->spare = NULL;
}

/* -- receiving -- */

static bool same_sender(const struct ucred *a, const struct ucred *b)
{
    return a->pid == b->pid && a->uid == b->uid && a->gid == b->gid;
}

int eb_connection_fill(struct eb_connection *c)
{
    struct ucred sender = {.pid = -1, .uid = (uid_t)-1, .gid = (gid_t)-1};
    const bool anew = c->channel.in_size == 0;
    int got = eb_channel_fill(&c->channel, &sender);
    if (anew && got != 0)
        c->foreign = false;
    if (got > 0 && c->only != NULL && !same_sender(&sender, c->only))
        c->foreign = true;
    return got;
}

/* -- sending -- */

bool eb_is_at_rest(const struct eb_connection *c)
{
    return c->command == NULL && c->streams == NULL;
}

bool eb_is_blocked(const struct eb_connection *c)
{
    return c->channel.out_size > 0 && !c->corked;
}

void eb_reply(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size)
{
    if (c->closing)
        return;
    bool hold = c->coalesces && !eb_is_blocked(c);
    if (!eb_channel_send(&c->channel, kind, payload, size, NULL, 0, hold)) {
        eb_mark_closing(c);
        return;
    }
    if (hold && !c->corked) {
        c->corked = true;
        c->corked_until = eb_now_ms() + CORK_MS;
        eb_wake_by(c->corked_until);
    }
    if (c->corked && c->channel.out_size > MOST_CORKED)
        eb_uncork(c);
    if (eb_is_blocked(c))
        eb_mark(c);
}

void eb_reply_u32(struct eb_connection *c, enum eb_kind kind, uint32_t number)
{
    uint8_t payload[4];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, number);
    eb_reply(c, kind, payload, sizeof payload);
}

void eb_refuse(struct eb_connection *c, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    c->coalesces = false;
    eb_uncork(c);
    if (!c->closing)
        eb_channel_refuse(&c->channel, format, arguments);
    va_end(arguments);
    eb_mark_closing(c);
}

void eb_uncork(struct eb_connection *c)
{
    if (c->corked)
        eb_connection_flush(c);
}

void eb_connection_flush(struct eb_connection *c)
{
    c->corked = false;
    if (!c->closing && !eb_channel_flush(&c->channel))
        eb_mark_closing(c);
}
