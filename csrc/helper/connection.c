#include "helper/connection.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SMALL = 4 << 10, LARGE = 256 << 10 };

int eb_connection_frame(const struct eb_connection *c, struct eb_frame *frame)
{
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

bool eb_connection_send(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size)
{
    uint8_t header[EB_HEADER_SIZE];
    struct eb_writer w = eb_writer(header, sizeof header);
    eb_put_u32(&w, (uint32_t)size);
    eb_put_u8(&w, kind);
    ssize_t n = c->out_size > 0 ? 0 : eb_send(c->fd, header, sizeof header, payload, size);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        return false;
    size_t sent = n > 0 ? (size_t)n : 0;
    if (sent < sizeof header)
        return keep(c, header + sent, sizeof header - sent) && keep(c, payload, size);
    sent -= sizeof header;
    return sent == size || keep(c, (const uint8_t *)payload + sent, size - sent);
}

bool eb_connection_hold(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size)
{
    uint8_t header[EB_HEADER_SIZE];
    struct eb_writer w = eb_writer(header, sizeof header);
    eb_put_u32(&w, (uint32_t)size);
    eb_put_u8(&w, kind);
    return keep(c, header, sizeof header) && keep(c, payload, size);
}

bool eb_connection_flush(struct eb_connection *c)
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

void eb_connection_close(struct eb_connection *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    eb_fds_clear(&c->fds);
    eb_request_free(&c->request);
    free(c->in);
    free(c->out);
    c->in = c->out = NULL;
    c->in_at = c->in_size = c->in_capacity = c->out_size = 0;
}
