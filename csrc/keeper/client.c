#include "keeper/client.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static unsigned counts[EB_CLIENT_VISITOR + 1];

struct eb_client *eb_client_new(int fd, enum eb_client_kind kind)
{
    struct eb_client *c = malloc(sizeof *c);
    if (c == NULL) {
        close(fd);
        return NULL;
    }
    *c = (struct eb_client){
        .source = EB_KEEPER_CLIENT,
        .kind = kind,
        .channel.fd = fd,
        .room = EB_WINDOW,
        .watch.fd = -1,
        .next = keeper.clients,
    };
    if (c->next != NULL)
        c->next->previous = c;
    keeper.clients = c;
    counts[kind]++;
    uint8_t version[4];
    struct eb_writer w = eb_writer(version, sizeof version);
    eb_put_u32(&w, EB_VERSION);
    if (kind != EB_CLIENT_SERVER)
        eb_client_send(c, EB_HELLO, version, sizeof version);
    return c;
}

unsigned eb_client_count(enum eb_client_kind kind)
{
    return counts[kind];
}

void eb_client_free(struct eb_client *c)
{
    if (c->previous != NULL)
        c->previous->next = c->next;
    else
        keeper.clients = c->next;
    if (c->next != NULL)
        c->next->previous = c->previous;
    counts[c->kind]--;
    eb_channel_close(&c->channel);
    free(c->typed);
    free(c);
}

bool eb_client_is_blocked(const struct eb_client *c)
{
    return c->channel.out_size > 0;
}

/* A send fails when the peer has gone, or when memory is short; then a part of a frame may be missing. */
static void stop_sending(struct eb_client *c)
{
    c->broken = errno != EPIPE && errno != ECONNRESET;
    c->deaf = true;
    free(c->channel.out);
    c->channel.out = NULL;
    c->channel.out_size = 0;
}

void eb_client_flush(struct eb_client *c)
{
    if (!eb_channel_flush(&c->channel))
        stop_sending(c);
}

void eb_client_send_piece(struct eb_client *c, const void *head, size_t head_size, const void *data, size_t size)
{
    if (!c->closing && !c->deaf && !eb_channel_send(&c->channel, EB_PIECE, head, head_size, data, size, false))
        stop_sending(c);
}

void eb_client_send(struct eb_client *c, enum eb_kind kind, const void *payload, size_t size)
{
    if (!c->closing && !c->deaf && !eb_channel_send(&c->channel, kind, payload, size, NULL, 0, false))
        stop_sending(c);
}

void eb_client_refuse(struct eb_client *c, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (!c->closing && !c->deaf)
        eb_channel_refuse(&c->channel, format, arguments);
    va_end(arguments);
    c->closing = c->broken = true;
}
