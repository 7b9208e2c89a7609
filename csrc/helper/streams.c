/*
 * A command's standard input and output as frames.  Input is bounded by the window that its client was
 * given; output is read from its pipe only while the socket takes it.
 */
#include "helper/service.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum {
    CHUNK = 64 << 10,
    LEAST_CREDIT = 16 << 10,
    LAZY_MS = 10,
    WORDY = 32 << 10, /* bytes, half of what a pipe takes */
    MOST_LOOKS = 3,   /* a full pipe's bytes, its end, and one to spare */
};

static uint8_t chunk[CHUNK];

static void close_stream(struct eb_streams *s, int number)
{
    if (s->fds[number] < 0)
        return;
    /* By hand: a new process may hold a copy, which would keep it in the set. */
    if (s->watched[number])
        eb_unwatch_fd(s->fds[number]);
    s->watched[number] = false;
    close(s->fds[number]);
    s->fds[number] = -1;
}

void eb_streams_close(struct eb_connection *c)
{
    struct eb_streams *s = c->streams;
    if (s == NULL)
        return;
    for (int i = 0; i < 3; i++)
        close_stream(s, i);
    free(s->pending);
    free(s);
    c->streams = NULL;
}

/* Makes the pipes; `ends` are the command's. */
bool eb_streams_make(struct eb_connection *c, int ends[3])
{
    struct eb_streams *s = calloc(1, sizeof *s);
    if (s == NULL)
        return false;
    c->streams = s;
    *s = (struct eb_streams){.fds = {-1, -1, -1}, .window = EB_WINDOW};
    /* What a short command says, its pipe can hold until it has ended: that saves watching the pipe. */
    if (eb_has(&c->request, EB_TAG_BRIEF) && !c->wordy) {
        s->lazy_until = eb_now_ms() + LAZY_MS;
        eb_look_by(s->lazy_until);
    }
    for (int i = 0; i < 3; i++) {
        int pipe[2];
        if (!(c->request.streams >> i & 1))
            continue;
        if (pipe2(pipe, O_CLOEXEC) != 0)
            goto failed;
        s->fds[i] = i == 0 ? pipe[1] : pipe[0];
        ends[i] = i == 0 ? pipe[0] : pipe[1];
        /* The command may open it anew, as /dev/stdout. */
        if (c->peer != NULL && fchown(ends[i], c->peer->uid, c->peer->gid) != 0)
            goto failed;
        /* Each end has flags of its own: the command's stays blocking. */
        if (fcntl(s->fds[i], F_SETFL, O_NONBLOCK) != 0)
            goto failed;
    }
    return true;
failed:;
    int error = errno;
    for (int i = 0; i < 3; i++)
        if (ends[i] >= 0)
            close(ends[i]);
    ends[0] = ends[1] = ends[2] = -1;
    eb_streams_close(c);
    errno = error;
    return false;
}

static void want(struct eb_connection *c, int number, bool wanted)
{
    struct eb_streams *s = c->streams;
    if (s->fds[number] < 0 || s->watched[number] == wanted)
        return;
    if (!wanted)
        eb_unwatch_fd(s->fds[number]);
    else if (!eb_watch_fd(s->fds[number], number == 0 ? EPOLLOUT : EPOLLIN, &c->stream_sources[number])) {
        eb_close_connection(c);
        return;
    }
    s->watched[number] = wanted;
}

/* Over: the command has ended, and nobody holds its output any more. */
static void finish(struct eb_connection *c)
{
    struct eb_streams *s = c->streams;
    if (s != NULL && c->child == 0 && !c->starting && s->fds[1] < 0 && s->fds[2] < 0)
        eb_streams_close(c);
    if (eb_at_rest(c))
        eb_let_go(c);
}

void eb_streams_resume(struct eb_connection *c)
{
    if (c->starting)
        return;
    finish(c);
    for (int i = 1; i < 3 && c->streams != NULL; i++)
        want(c, i, c->streams->lazy_until == 0 && !eb_is_blocked(c));
}

static void give_credit(struct eb_connection *c, uint32_t size)
{
    struct eb_streams *s = c->streams;
    uint8_t payload[4];
    s->credit += size;
    if (s->credit < LEAST_CREDIT)
        return;
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, s->credit);
    s->window += s->credit;
    s->credit = 0;
    eb_reply(c, EB_CREDIT, payload, sizeof payload);
    eb_let_go(c); /* it is waited for */
}

/* Returns how much of it is done with. */
static uint32_t write_input(struct eb_streams *s, const uint8_t *data, uint32_t size)
{
    if (s->fds[0] < 0)
        return size; /* the command has closed it: as for a writer that ignores SIGPIPE */
    ssize_t n = write(s->fds[0], data, size);
    if (n >= 0)
        return (uint32_t)n;
    if (errno == EAGAIN || errno == EINTR)
        return 0;
    close_stream(s, 0);
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
            close_stream(s, 0);
    }
    want(c, 0, s->pending_size > 0);
    if (n > 0 && c->streams != NULL)
        give_credit(c, n);
}

void eb_on_stdin(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_streams *s = c->streams;
    uint32_t size = frame->size;
    /* Late input, for a command that has ended meanwhile, is dropped. */
    if (s == NULL || s->ended) {
        eb_connection_consume(c, EB_HEADER_SIZE + size);
        return;
    }
    if (size > s->window) {
        eb_refuse(c, "STDIN of %u bytes, where %u may be sent", (unsigned)size, (unsigned)s->window);
        return;
    }
    s->window -= size;
    s->ended = size == 0;
    if (size > 0) {
        uint8_t *pending = realloc(s->pending, s->pending_size + size);
        if (pending == NULL) {
            eb_close_connection(c);
            return;
        }
        memcpy(pending + s->pending_size, frame->payload, size);
        s->pending = pending;
        s->pending_size += size;
    }
    eb_connection_consume(c, EB_HEADER_SIZE + size);
    drain_input(c);
}

/* Returns whether there may be more. */
static bool pass_output(struct eb_connection *c, int number)
{
    struct eb_streams *s = c->streams;
    ssize_t n = read(s->fds[number], chunk, sizeof chunk);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n <= 0) {
        n = 0;
        close_stream(s, number);
    }
    s->passed += (uint64_t)n;
    eb_reply(c, number == 1 ? EB_STDOUT : EB_STDERR, chunk, (size_t)n);
    return n > 0;
}

bool eb_streams_are_due(struct eb_connection *c, uint64_t now)
{
    if (c->streams == NULL || c->streams->lazy_until == 0)
        return false;
    if (now < c->streams->lazy_until) {
        eb_look_by(c->streams->lazy_until);
        return false;
    }
    c->streams->lazy_until = 0;
    return !c->starting; /* else it is watched when that is over */
}

void eb_streams_gather(struct eb_connection *c)
{
    if (c->streams == NULL)
        return;
    bool lazy = c->streams->lazy_until != 0;
    c->streams->lazy_until = 0;
    for (int number = 1; number < 3; number++)
        for (int i = 0; lazy && i < MOST_LOOKS && c->streams != NULL && c->streams->fds[number] >= 0; i++)
            if (eb_is_blocked(c) || !pass_output(c, number))
                break;
    if (c->streams != NULL)
        c->wordy = c->streams->passed > WORDY;
}

void eb_on_stream(struct eb_connection *c, int number)
{
    struct eb_streams *s = c->streams;
    if (s == NULL || s->fds[number] < 0 || !s->watched[number] || (number > 0 && eb_is_blocked(c)))
        return;
    if (number == 0)
        drain_input(c);
    else
        (void)pass_output(c, number);
    eb_proceed(c);
}
