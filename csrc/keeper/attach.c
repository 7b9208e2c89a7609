#include "keeper/attach.h"

#include "owner/terminal.h"

#include <errno.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    LEAST_CREDIT = 16 << 10,
    REDRAW_MS = 50, /* between two sizes, so that a program notices each */
};

static struct attached {
    bool input_ended; /* close the input when all that was typed before has been written */
    uint8_t last_typed;
    uint64_t turns;      /* counts turns of clients that type */
    struct winsize size; /* the terminal's size */
    uint64_t redraw_at;  /* of eb_now_ms: when the terminal gets its size back, after another one; 0: it has it */
} attached;

/* -- windows -- */

static void set_size(struct winsize w)
{
    if (eb_keeper_has(1))
        (void)ioctl(keeper.fds[1], TIOCSWINSZ, &w); /* fails if the terminal has gone */
}

static unsigned short less(unsigned short a, unsigned short b)
{
    return a < b ? a : b;
}

void eb_attach_begin(const struct winsize *w)
{
    attached = (struct attached){.size = *w, .last_typed = '\n'};
}

void eb_attach_fit(void)
{
    struct winsize least = {0};
    for (const struct eb_client *c = keeper.clients; c != NULL; c = c->next) {
        const struct winsize *w = &c->window;
        if (!c->attached || w->ws_row == 0)
            continue;
        if (least.ws_row == 0)
            least = *w;
        least.ws_row = less(least.ws_row, w->ws_row);
        least.ws_col = less(least.ws_col, w->ws_col);
        least.ws_xpixel = less(least.ws_xpixel, w->ws_xpixel);
        least.ws_ypixel = less(least.ws_ypixel, w->ws_ypixel);
    }
    if (!keeper.terminal || least.ws_row == 0 || memcmp(&least, &attached.size, sizeof least) == 0)
        return; /* the last client's size stays */
    attached.size = least;
    attached.redraw_at = 0;
    set_size(attached.size);
}

/* Sets another size for a moment, because a program may ignore a SIGWINCH without a change of size. */
static void redraw(void)
{
    struct winsize w = attached.size;
    if (!keeper.terminal)
        return;
    w.ws_row = (unsigned short)(w.ws_row > 1 ? w.ws_row - 1 : w.ws_row + 1);
    set_size(w);
    attached.redraw_at = eb_now_ms() + REDRAW_MS;
}

void eb_attach_wake(uint64_t now)
{
    if (attached.redraw_at != 0 && now >= attached.redraw_at) {
        attached.redraw_at = 0;
        set_size(attached.size);
    } else if (attached.redraw_at != 0) {
        eb_keeper_wake_by(attached.redraw_at);
    }
}

static unsigned short get_side(struct eb_reader *r)
{
    uint32_t n = eb_get_u32(r);
    return n < UINT16_MAX ? (unsigned short)n : UINT16_MAX;
}

static struct winsize get_window(struct eb_reader *r)
{
    struct winsize w = {0};
    w.ws_row = get_side(r);
    w.ws_col = get_side(r);
    w.ws_xpixel = get_side(r);
    w.ws_ypixel = get_side(r);
    return w;
}

void eb_on_window(struct eb_client *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    c->window = get_window(&r);
    if (c->attached)
        eb_attach_fit();
}

void eb_on_attach(struct eb_client *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    const uint8_t flags = eb_get_u8(&r);
    int writers = 0;
    for (const struct eb_client *other = keeper.clients; other != NULL; other = other->next)
        writers += other->writes && other != c;
    if ((flags & EB_ATTACH_WRITES) && writers >= EB_MAX_WRITERS) {
        eb_client_refuse(c, "%d other clients write to this job, which is the limit", writers);
        return;
    }
    c->attached = true;
    c->writes = (flags & EB_ATTACH_WRITES) != 0;
    c->window = get_window(&r);
    const struct winsize before = attached.size;
    eb_attach_fit();
    if ((flags & EB_ATTACH_REDRAWS) && memcmp(&before, &attached.size, sizeof before) == 0)
        redraw();
}

/* -- input -- */

static bool has_read_all(const struct eb_client *c)
{
    int unread;
    return ioctl(c->channel.fd, SIOCOUTQ, &unread) == 0 && unread == 0;
}

/* A small credit lets a client know that the command has all of its input.  One that does not read gets no more of
 * them, because they would fill its socket. */
static void give_credit(struct eb_client *c)
{
    const uint32_t used = c->room + c->typed_size;
    const uint32_t credit = used < EB_WINDOW ? EB_WINDOW - used : 0;
    if (credit == 0 || c->gone || (credit < LEAST_CREDIT && (c->typed_size > 0 || !has_read_all(c))))
        return;
    uint8_t payload[4];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, credit);
    eb_client_send(c, EB_CREDIT, payload, sizeof payload);
    c->room += credit;
}

static void forget_typed(struct eb_client *c)
{
    free(c->typed);
    c->typed = NULL;
    c->typed_size = 0;
}

bool eb_attach_has_typed(void)
{
    for (const struct eb_client *c = keeper.clients; c != NULL; c = c->next)
        if (c->typed_size > 0)
            return true;
    return false;
}

void eb_attach_end_input(void)
{
    eb_keeper_close(0);
    for (struct eb_client *c = keeper.clients; c != NULL; c = c->next)
        forget_typed(c);
}

/* The client that has waited for the longest time. */
static struct eb_client *next_writer(void)
{
    struct eb_client *next = NULL;
    for (struct eb_client *c = keeper.clients; c != NULL; c = c->next)
        if (c->typed_size > 0 && (next == NULL || c->typing_served < next->typing_served))
            next = c;
    return next;
}

void eb_attach_write(void)
{
    struct eb_client *c;
    while (eb_keeper_has(0) && (c = next_writer()) != NULL) {
        ssize_t n = write(keeper.fds[0], c->typed, c->typed_size);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0) { /* the command has closed it: as for a writer that ignores SIGPIPE */
            eb_attach_end_input();
            return;
        }
        c->typing_served = ++attached.turns;
        c->typed_size -= (uint32_t)n;
        memmove(c->typed, c->typed + n, c->typed_size);
        if (c->typed_size == 0)
            forget_typed(c);
        give_credit(c);
    }
    if (attached.input_ended && eb_keeper_has(0))
        eb_attach_end_input();
}

static bool add_typed(struct eb_client *c, const uint8_t *data, uint32_t count)
{
    uint8_t *typed = realloc(c->typed, c->typed_size + count);
    if (typed == NULL)
        return false;
    memcpy(typed + c->typed_size, data, count);
    c->typed = typed;
    c->typed_size += count;
    return true;
}

void eb_on_typed(struct eb_client *c, const struct eb_frame *frame)
{
    uint8_t keys[EB_MOST_KEYS];
    const uint8_t *data = frame->payload;
    uint32_t count = frame->size;
    if (!c->writes) {
        eb_client_refuse(c, "STDIN before an ATTACH that writes");
        return;
    }
    if (count > c->room) {
        eb_client_refuse(c, "STDIN of %u bytes, where %u may be sent", (unsigned)count, (unsigned)c->room);
        return;
    }
    c->room -= count;
    if (!eb_keeper_has(0) || attached.input_ended) {
        give_credit(c); /* nobody reads the input */
        return;
    }
    if (count > 0) {
        attached.last_typed = data[count - 1];
    } else if (keeper.terminal) {
        data = keys;
        count = c->typed_size < EB_WINDOW ? eb_terminal_end(keeper.fds[0], attached.last_typed, keys) : 0;
        attached.last_typed = '\n';
    } else {
        attached.input_ended = true;
    }
    if (count > 0 && !add_typed(c, data, count)) {
        c->broken = true;
        return;
    }
    eb_attach_write();
}
