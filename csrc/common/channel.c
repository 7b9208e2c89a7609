#include "common/channel.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SMALL = 4 << 10,
    LARGE = 256 << 10,
    MOST_FIRST = 32, /* bytes of a payload's first part, if it has two */
};

void eb_channel_close(struct eb_channel *c)
{
    close(c->fd);
    eb_fds_clear(&c->fds);
    free(c->in);
    free(c->out);
    *c = (struct eb_channel){.fd = -1};
}

/* -- receiving -- */

int eb_channel_frame(const struct eb_channel *c, struct eb_frame *frame)
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

/* The buffer grows with the data that has arrived, so that a declared length costs the sender, not us. */
static bool make_room(struct eb_channel *c)
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

int eb_channel_fill(struct eb_channel *c, struct ucred *sender)
{
    if (!make_room(c))
        return -1;
    ssize_t n = eb_receive(c->fd, c->in + c->in_size, c->in_capacity - c->in_size, &c->fds, sender);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -1;
    c->in_size += (size_t)n;
    return n > 0 ? 1 : -1;
}

bool eb_channel_is_drained(const struct eb_channel *c)
{
    return c->in_size < c->in_capacity;
}

void eb_channel_consume(struct eb_channel *c, size_t size)
{
    c->in_at += size;
    c->in_size -= size;
    if (c->in_size == 0) {
        free(c->in);
        c->in = NULL;
        c->in_at = c->in_capacity = 0;
    }
}

uint8_t *eb_channel_take(struct eb_channel *c, struct eb_frame *frame)
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
    eb_channel_consume(c, EB_HEADER_SIZE + frame->size);
    return bytes;
}

/* -- sending -- */

static bool keep(struct eb_channel *c, const uint8_t *data, size_t size)
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

bool eb_channel_send(struct eb_channel *c, enum eb_kind kind, const void *first, size_t first_size, const void *second,
                     size_t second_size, bool hold)
{
    uint8_t head[EB_HEADER_SIZE + MOST_FIRST];
    struct eb_writer w = eb_writer(head, sizeof head);
    eb_put_u32(&w, (uint32_t)(first_size + second_size));
    eb_put_u8(&w, kind);
    if (second_size > 0) {
        eb_put_bytes(&w, first, first_size);
    } else {
        second = first;
        second_size = first_size;
    }
    const size_t head_size = eb_written(&w);
    ssize_t n = hold || c->out_size > 0 ? 0 : eb_send(c->fd, head, head_size, second, second_size);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        return false;
    size_t sent = n > 0 ? (size_t)n : 0;
    if (sent < head_size)
        return keep(c, head + sent, head_size - sent) && keep(c, second, second_size);
    sent -= head_size;
    return sent == second_size || keep(c, (const uint8_t *)second + sent, second_size - sent);
}

void eb_channel_refuse(struct eb_channel *c, const char *format, va_list arguments)
{
    char reason[EB_MAX_REASON];
    int length = vsnprintf(reason, sizeof reason, format, arguments);
    size_t size = length < (int)sizeof reason ? (size_t)length : sizeof reason - 1;
    (void)eb_channel_send(c, EB_REFUSED, reason, size, NULL, 0, false);
}

bool eb_channel_flush(struct eb_channel *c)
{
    if (c->out_size == 0)
        return true;
    ssize_t n = eb_send(c->fd, c->out, c->out_size, NULL, 0);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK;
    c->out_size -= (size_t)n;
    memmove(c->out, c->out + n, c->out_size);
    if (c->out_size == 0) {
        free(c->out);
        c->out = NULL;
    }
    return true;
}
