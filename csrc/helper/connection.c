#include "helper/connection.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SMALL = 4 << 10,
    LARGE = 256 << 10,
    CORK_MS = 10,
    MOST_CORKED = 32 << 10, /* bytes */
    GRAIN_MS = 4,           /* wakes are put off to multiples of it, so that few are for one object only */
};

struct eb_helper helper;

uint64_t eb_clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

uint64_t eb_now_ms(void)
{
    return eb_clock_ns(CLOCK_MONOTONIC) / 1000000;
}

void eb_wake_by(uint64_t when)
{
    uint64_t wake = (when / GRAIN_MS + 1) * GRAIN_MS;
    if (helper.next_wake == 0 || wake < helper.next_wake)
        helper.next_wake = wake;
}

/* -- marks -- */

void eb_mark(struct eb_connection *c)
{
    if (c->marked || c->fd < 0)
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

/* -- the beginning and the end -- */

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
        .fd = fd,
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
    close(c->fd);
    c->fd = -1;
    eb_fds_clear(&c->fds);
    free(c->spare);
    free(c->in);
    free(c->out);
    c->in = c->out = NULL;
    c->spare = NULL;
    c->in_at = c->in_size = c->in_capacity = c->out_size = 0;
}

/* -- what comes -- */

int eb_connection_frame(const struct eb_connection *c, struct eb_frame *frame)
{
    if (c->in_size == 0)
        return 0;
    struct eb_reader r = eb_reader(c->in + c->in_at, c->in_size);
    uint32_t size = eb_get_u32(&r);
    uint8_t kind = eb_get_u8(&r);
    if (r.bad)
        return 0;
    if (size > EB_MAX_FRAME)
        return -1;
    *frame = (struct eb_frame){.kind = kind, .size = size};
    if (size > eb_remaining(&r))
        return 0;
    frame->payload = eb_get_bytes(&r, size);
    return 1;
}

/* Room grows with what has really come, so that a declared length costs its sender, not us. */
static bool make_room(struct eb_connection *c)
{
    if (c->in_at > 0)
        memmove(c->in, c->in + c->in_at, c->in_size);
    c->in_at = 0;
    if (c->in_size < c->in_capacity)
        return true;
    size_t capacity = c->in_capacity == 0 ? SMALL : c->in_capacity < LARGE ? LARGE : c->in_capacity * 2;
    if (capacity > 2 * (size_t)EB_MAX_FRAME)
        return false;
    uint8_t *in = realloc(c->in, capacity);
    if (in == NULL)
        return false;
    c->in = in;
    c->in_capacity = capacity;
    return true;
}

static bool same_sender(const struct ucred *a, const struct ucred *b)
{
    return a->pid == b->pid && a->uid == b->uid && a->gid == b->gid;
}

int eb_connection_fill(struct eb_connection *c)
{
    struct ucred sender = {.pid = -1, .uid = (uid_t)-1, .gid = (gid_t)-1};
    if (!make_room(c))
        return -1;
    ssize_t n = eb_receive(c->fd, c->in + c->in_size, c->in_capacity - c->in_size, &c->fds, &sender);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -1;
    if (c->in_size == 0)
        c->foreign = false;
    if (n > 0 && c->only != NULL && !same_sender(&sender, c->only))
        c->foreign = true;
    c->in_size += (size_t)n;
    return n > 0 ? 1 : -1;
}

void eb_connection_consume(struct eb_connection *c, size_t size)
{
    c->in_at += size;
    c->in_size -= size;
    if (c->in_size == 0) {
        free(c->in);
        c->in = NULL;
        c->in_at = c->in_capacity = 0;
    }
}

uint8_t *eb_connection_take(struct eb_connection *c, struct eb_frame *frame)
{
    uint8_t *bytes = c->in;
    if (c->in_size == EB_HEADER_SIZE + (size_t)frame->size) {
        c->in = NULL;
    } else {
        bytes = malloc(frame->size + 1);
        if (bytes == NULL)
            return NULL;
        memcpy(bytes, frame->payload, frame->size);
        frame->payload = bytes;
    }
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
    return bytes;
}

/* -- what goes -- */

static bool keep(struct eb_connection *c, const uint8_t *data, size_t size)
{
    if (size == 0)
        return true;
    uint8_t *out = realloc(c->out, c->out_size + size);
    if (out == NULL)
        return false;
    memcpy(out + c->out_size, data, size);
    c->out = out;
    c->out_size += size;
    return true;
}

/* Sends a frame, or keeps what the socket does not take, or all of it; false: the peer is gone or memory is short. */
static bool send_frame(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size, bool hold)
{
    uint8_t header[EB_HEADER_SIZE];
    struct eb_writer w = eb_writer(header, sizeof header);
    eb_put_u32(&w, (uint32_t)size);
    eb_put_u8(&w, kind);
    ssize_t n = hold || c->out_size > 0 ? 0 : eb_send(c->fd, header, sizeof header, payload, size);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        return false;
    size_t sent = n > 0 ? (size_t)n : 0;
    if (sent < sizeof header)
        return keep(c, header + sent, sizeof header - sent) && keep(c, payload, size);
    sent -= sizeof header;
    return sent == size || keep(c, (const uint8_t *)payload + sent, size - sent);
}

bool eb_is_at_rest(const struct eb_connection *c)
{
    return c->command == NULL && c->streams == NULL;
}

bool eb_is_blocked(const struct eb_connection *c)
{
    return c->out_size > 0 && !c->corked;
}

void eb_reply(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size)
{
    if (c->closing)
        return;
    bool hold = c->coalesces && !eb_is_blocked(c);
    if (!send_frame(c, kind, payload, size, hold)) {
        eb_mark_closing(c);
        return;
    }
    if (hold && !c->corked) {
        c->corked = true;
        c->corked_until = eb_now_ms() + CORK_MS;
        eb_wake_by(c->corked_until);
    }
    if (c->corked && c->out_size > MOST_CORKED)
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
    char reason[EB_MAX_REASON];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    c->coalesces = false;
    eb_uncork(c);
    eb_reply(c, EB_REFUSED, reason, length < (int)sizeof reason ? (size_t)length : sizeof reason - 1);
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
    if (c->out_size == 0 || c->closing)
        return;
    ssize_t n = eb_send(c->fd, c->out, c->out_size, NULL, 0);
    if (n < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            eb_mark_closing(c);
        return;
    }
    c->out_size -= (size_t)n;
    memmove(c->out, c->out + n, c->out_size);
    if (c->out_size == 0) {
        free(c->out);
        c->out = NULL;
    }
}
