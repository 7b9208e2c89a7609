#include "keeper/follow.h"

enum { PIECES_PER_TURN = 8 };

void eb_on_follow(struct eb_client *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    const uint64_t first = eb_get_u64(&r);
    uint64_t known[EB_RINGS];
    for (int i = 0; i < EB_RINGS; i++)
        known[i] = eb_get_u64(&r);
    const uint8_t flags = eb_get_u8(&r);
    c->follows = EB_FOLLOWS_OUTPUT;
    c->follows_on = (flags & EB_FOLLOW_ON) != 0 && !(flags & EB_FOLLOW_QUIET);
    c->caught_up = false;
    if (flags & (EB_FOLLOW_NEW | EB_FOLLOW_QUIET))
        eb_cursor_end(&c->cursor);
    else
        eb_cursor_start(&c->cursor, first, known);
}

static void tell_missed(struct eb_client *c)
{
    for (int i = 0; i < EB_RINGS; i++) {
        uint64_t *missed = &c->cursor.rings[i].missed;
        if (*missed == 0)
            continue;
        uint8_t payload[9];
        struct eb_writer w = eb_writer(payload, sizeof payload);
        eb_put_u8(&w, (uint8_t)(i + 1));
        eb_put_u64(&w, *missed);
        eb_client_send(c, EB_MISSED, payload, sizeof payload);
        *missed = 0;
    }
}

static void tell_log(struct eb_client *c)
{
    uint8_t payload[4];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, (uint32_t)keeper.log_error);
    eb_client_send(c, EB_LOG_FAILED, payload, sizeof payload);
    c->log_error = keeper.log_error;
}

/* This sends from the buffer, not from the file by sendfile(2), which would put pages into the socket that may be
 * overwritten before they are received. */
static void send_piece(struct eb_client *c, int stream)
{
    uint8_t head[17];
    struct eb_writer w = eb_writer(head, sizeof head);
    const struct eb_cursor_ring ring = c->cursor.rings[stream - 1];
    eb_put_u64(&w, ring.sequence);
    eb_put_u64(&w, ring.time_us);
    eb_put_u8(&w, (uint8_t)stream);
    const uint8_t *data = eb_cursor_take(&c->cursor, stream);
    if (data != NULL)
        eb_client_send_piece(c, head, sizeof head, data, ring.size);
}

bool eb_follow(struct eb_client *c)
{
    const bool started = keeper.state == EB_KEEPER_RUNNING || keeper.state == EB_KEEPER_OVER;
    if (c->closing || c->broken || c->deaf || c->gone || !started)
        return false;
    if (c->follows != EB_FOLLOWS_NOTHING && c->log_error != keeper.log_error && !eb_client_is_blocked(c))
        tell_log(c);
    for (int i = 0; c->follows == EB_FOLLOWS_OUTPUT; i++) {
        if (eb_client_is_blocked(c))
            return false;
        int stream = eb_cursor_next(&c->cursor);
        tell_missed(c);
        if (eb_client_is_blocked(c))
            return false;
        if (stream != 0 && i == PIECES_PER_TURN)
            return true;
        if (stream != 0) {
            send_piece(c, stream);
            continue;
        }
        if (!c->caught_up)
            eb_client_send(c, EB_CAUGHT_UP, NULL, 0);
        c->caught_up = true;
        if (c->follows_on && keeper.state == EB_KEEPER_RUNNING)
            return false;
        c->follows = EB_FOLLOWS_END;
    }
    if (c->follows == EB_FOLLOWS_END && keeper.state == EB_KEEPER_OVER) {
        if (keeper.exited_size > 0)
            eb_client_send(c, EB_EXITED, keeper.exited, keeper.exited_size);
        c->closing = true;
    }
    return false;
}

void eb_follow_all(void)
{
    for (struct eb_client *c = keeper.clients; c != NULL; c = c->next)
        (void)eb_follow(c);
}
