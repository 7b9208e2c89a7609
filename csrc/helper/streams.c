#include "helper/streams.h"

#include "owner/stdio.h"
#include "owner/terminal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    LEAST_CREDIT = 16 << 10,
    LAZY_MS = 10,
    LARGE_OUTPUT = 32 << 10, /* bytes, half of what a pipe holds */
    MOST_READS = 3,          /* for a full pipe's bytes, its end, and one to spare */
};

static uint8_t chunk[EB_MAX_OUTPUT];

static bool is_open(const struct eb_streams *s, int number)
{
    return s->fds[number] >= 0 && !(s->over >> number & 1);
}

static void mark_over(struct eb_streams *s, int number)
{
    s->over |= (uint8_t)(1 << number);
}

void eb_streams_abandon(struct eb_connection *c)
{
    if (c->streams != NULL)
        c->streams->over = 7;
}

void eb_streams_free(struct eb_connection *c)
{
    free(c->streams->pending);
    free(c->streams);
    c->streams = NULL;
}

bool eb_streams_make(struct eb_connection *c, const struct eb_request *q, int ends[3])
{
    struct eb_streams *s = malloc(sizeof *s);
    if (s == NULL)
        return false;
    *s = (struct eb_streams){.fds = {-1, -1, -1}, .window = EB_WINDOW, .last = '\n'};
    c->streams = s;
    /* A pipe can hold a short command's output until the command has ended, which saves watching the pipe. */
    if (eb_has(q, EB_TAG_COALESCE) && !c->large_output) {
        s->lazy_until = eb_now_ms() + LAZY_MS;
        eb_wake_by(s->lazy_until);
    }
    s->terminal = eb_has(q, EB_TAG_TERMINAL);
    if (eb_stdio_open(q, s->fds, ends))
        return true;
    eb_streams_abandon(c);
    return false;
}

bool eb_streams_want(const struct eb_connection *c, int number)
{
    const struct eb_streams *s = c->streams;
    return number == 0 ? s->pending_size > 0 : s->lazy_until == 0 && !eb_is_blocked(c);
}

/* -- input -- */

static void give_credit(struct eb_connection *c, uint32_t size)
{
    struct eb_streams *s = c->streams;
    s->credit += size;
    if (s->credit < LEAST_CREDIT)
        return;
    eb_reply_u32(c, EB_CREDIT, s->credit);
    s->window += s->credit;
    s->credit = 0;
    eb_uncork(c); /* the client may wait for it */
}

/* No process has the other end open: the terminal, which may be full all the same. */
static bool is_hung_up(int fd)
{
    struct pollfd p = {.fd = fd};
    return poll(&p, 1, 0) > 0 && (p.revents & POLLHUP) != 0;
}

/* Returns how many of the bytes are done with. */
static uint32_t write_input(struct eb_streams *s, const uint8_t *data, uint32_t size)
{
    if (!is_open(s, 0))
        return size; /* the command has closed it: as for a writer that ignores SIGPIPE */
    ssize_t n = write(s->fds[0], data, size);
    if (n >= 0)
        return (uint32_t)n;
    if (errno == EINTR || (errno == EAGAIN && !is_hung_up(s->fds[0])))
        return 0; /* a hang-up would be reported without end */
    mark_over(s, 0);
    return size;
}

static void drain_input(struct eb_connection *c)
{
    struct eb_streams *s = c->streams;
    uint32_t n = s->pending_size > 0 ? write_input(s, s->pending, s->pending_size) : 0;
    s->pending_size -= n;
    if (s->pending_size > 0) {
        memmove(s->pending, s->pending + n, s->pending_size);
    } else {
        free(s->pending);
        s->pending = NULL;
        if (s->ended)
            mark_over(s, 0);
    }
    /* Credit is of no use after the end of the input, and the keys that end a terminal's input are not the client's. */
    if (n > 0 && !s->ended)
        give_credit(c, n);
}

static bool add_input(struct eb_streams *s, const uint8_t *data, uint32_t size)
{
    uint8_t *pending = realloc(s->pending, s->pending_size + size);
    if (pending == NULL)
        return false;
    memcpy(pending + s->pending_size, data, size);
    s->pending = pending;
    s->pending_size += size;
    return true;
}

void eb_on_stdin(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_streams *s = c->streams;
    uint32_t size = frame->size;
    /* Input that comes late, for a command that has ended meanwhile, is dropped. */
    if (s == NULL || s->ended) {
        eb_channel_consume(&c->channel, EB_HEADER_SIZE + size);
        return;
    }
    if (size > s->window) {
        eb_refuse(c, "STDIN of %u bytes, where %u may be sent", (unsigned)size, (unsigned)s->window);
        return;
    }
    s->window -= size;
    s->ended = size == 0;
    uint8_t keys[EB_MOST_KEYS];
    const uint8_t *data = frame->payload;
    uint32_t typed = size;
    if (size > 0) {
        s->last = data[size - 1];
    } else if (s->terminal && is_open(s, 0)) {
        data = keys;
        typed = eb_terminal_end(s->fds[0], s->last, keys);
    }
    if (typed > 0 && !add_input(s, data, typed)) {
        eb_mark_closing(c);
        return;
    }
    eb_channel_consume(&c->channel, EB_HEADER_SIZE + size);
    drain_input(c);
}

void eb_on_winsize(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_streams *s = c->streams;
    /* A frame that comes late, for a command that has ended meanwhile, is dropped. */
    if (s != NULL && s->terminal && is_open(s, 1))
        eb_terminal_resize(s->fds[1], frame->payload, frame->size);
    eb_channel_consume(&c->channel, EB_HEADER_SIZE + frame->size);
}

/* -- output -- */

/* Returns whether there may be more. */
static bool pass_output(struct eb_connection *c, int number)
{
    struct eb_streams *s = c->streams;
    ssize_t n = read(s->fds[number], chunk, sizeof chunk);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n <= 0) {
        n = 0;
        mark_over(s, number);
    }
    s->passed += (uint64_t)n;
    eb_reply(c, number == 1 ? EB_STDOUT : EB_STDERR, chunk, (size_t)n);
    return n > 0;
}

void eb_streams_wake(struct eb_connection *c, uint64_t now)
{
    struct eb_streams *s = c->streams;
    if (s == NULL || s->lazy_until == 0)
        return;
    if (now < s->lazy_until) {
        eb_wake_by(s->lazy_until);
        return;
    }
    s->lazy_until = 0;
    eb_mark(c);
}

void eb_streams_gather(struct eb_connection *c)
{
    struct eb_streams *s = c->streams;
    if (s == NULL)
        return;
    bool lazy = s->lazy_until != 0;
    s->lazy_until = 0;
    for (int number = 1; number < 3; number++)
        for (int i = 0; lazy && i < MOST_READS && is_open(s, number) && !c->closing; i++)
            if (eb_is_blocked(c) || !pass_output(c, number))
                break;
    c->large_output = s->passed > LARGE_OUTPUT;
}

void eb_on_stream(struct eb_connection *c, int number)
{
    struct eb_streams *s = c->streams;
    if (s == NULL || !is_open(s, number) || !(s->watched >> number & 1) || (number > 0 && eb_is_blocked(c)))
        return; /* the event is out of date */
    if (number == 0)
        drain_input(c);
    else
        (void)pass_output(c, number);
    eb_mark(c);
}
