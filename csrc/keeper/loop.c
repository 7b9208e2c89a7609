/*
 * One round of the loop:
 *
 *   1. Each client has its turn: its frames are acted on, and it is sent what there is for it.  Only here are finished
 *      clients closed and freed, so that no event of a round points to a freed one.
 *   2. Due timers run, and all descriptors are watched for what is needed now.
 *   3. Each event goes to its owner.  The command's output is sent to its followers at once.
 *   4. The processes that have ended are waited for.
 */
#include "keeper/loop.h"

#include "common/heap.h"
#include "keeper/attach.h"
#include "keeper/command.h"
#include "keeper/follow.h"
#include "keeper/frames.h"
#include "keeper/notify.h"

#include <errno.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum {
    TRIM_MS = 100,     /* without an event until memory is given back */
    RETRY_MS = 100,    /* until what failed for lack of memory or descriptors is tried again */
    MOST_SERVERS = 16, /* connections of the server at a time */
};

static int epoll_fd;
static uint64_t accept_from; /* of eb_now_ms: accept no connection until then, for lack of descriptors; 0: accept */

static void unwatch(struct eb_watched *w)
{
    if (w->fd >= 0)
        (void)epoll_ctl(epoll_fd, EPOLL_CTL_DEL, w->fd, NULL);
    w->fd = -1;
}

/* Watches `fd` for `events`; 0 means a hang-up only.  False: there is no memory, or the user has no more watches. */
static bool watch(struct eb_watched *w, int fd, uint32_t events, const enum eb_keeper_source *source)
{
    if (w->fd == fd && w->events == events)
        return true;
    struct epoll_event event = {.events = events, .data.ptr = (void *)(uintptr_t)source};
    if (epoll_ctl(epoll_fd, w->fd == fd ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) != 0)
        return false;
    *w = (struct eb_watched){.fd = fd, .events = events};
    return true;
}

/* -- clients -- */

static void refuse_late(struct eb_client *c)
{
    eb_client_refuse(c, "the rest of a frame has not come in %llu ms", (unsigned long long)keeper.frame_timeout_ms);
}

/* Refuses a client that does not complete in time what it has begun. */
static void check_deadline(struct eb_client *c, uint64_t now)
{
    const bool asks = c->kind == EB_CLIENT_STARTER && keeper.state == EB_KEEPER_NEW;
    if (!eb_client_takes_frames(c) || !(c->channel.in_size > 0 || !c->greeted || asks)) {
        c->deadline = 0;
        return;
    }
    if (c->deadline == 0)
        c->deadline = now + keeper.frame_timeout_ms;
    if (now >= c->deadline)
        refuse_late(c);
    else
        eb_keeper_wake_by(c->deadline);
}

static bool is_done_with(const struct eb_client *c, uint64_t now)
{
    const bool over = keeper.state == EB_KEEPER_OVER;
    if (c->broken || (over && now >= keeper.over_ms + keeper.linger_ms))
        return true;
    if (c->gone)
        return c->typed_size == 0;
    return !eb_client_is_blocked(c) && (c->closing || (over && keeper.exited_size == 0));
}

static void close_client(struct eb_client *c)
{
    const bool attached = c->attached;
    unwatch(&c->watch);
    eb_client_free(c);
    if (attached)
        eb_attach_fit();
}

static void take_turn(struct eb_client *c, uint64_t now)
{
    c->has_more = eb_client_take_frames(c);
    if (c->has_more)
        eb_keeper_wake_by(now);
    const bool behind = eb_follow(c);
    check_deadline(c, now);
    if (is_done_with(c, now)) {
        close_client(c);
        return;
    }
    const bool blocked = eb_client_is_blocked(c);
    if (!blocked && !eb_client_takes_frames(c))
        unwatch(&c->watch); /* a hang-up is reported whatever the mask says */
    else if (!watch(&c->watch, c->channel.fd, blocked ? EPOLLOUT : EPOLLIN | (behind ? EPOLLOUT : 0u), &c->source))
        eb_keeper_wake_by(now + RETRY_MS);
}

static void on_client(struct eb_client *c)
{
    if (eb_client_is_blocked(c)) {
        eb_client_flush(c);
    } else if (eb_client_takes_frames(c) && !c->has_more) {
        struct ucred sender;
        int got = eb_channel_fill(&c->channel, &sender);
        c->gone = got < 0;
    }
}

static void accept_servers(void)
{
    for (unsigned i = eb_client_count(EB_CLIENT_SERVER); i < MOST_SERVERS; i++) {
        int fd = accept4(EB_LISTENER_FD, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0 && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            accept_from = eb_now_ms() + RETRY_MS;
        if (fd < 0)
            return;
        struct ucred peer;
        socklen_t size = sizeof peer;
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == keeper.server)
            (void)eb_client_new(fd, EB_CLIENT_SERVER);
        else
            close(fd);
    }
}

/* -- descriptors -- */

static const enum eb_keeper_source sources[EB_KEEPER_CLIENT] = {
    EB_KEEPER_SIGNALS, EB_KEEPER_LISTENER, EB_KEEPER_START,  EB_KEEPER_NOTIFY,
    EB_KEEPER_STDIN,   EB_KEEPER_STDOUT,   EB_KEEPER_STDERR,
};
static struct eb_watched watches[EB_KEEPER_CLIENT];

static void want(enum eb_keeper_source source, bool wanted, int fd, uint32_t events)
{
    struct eb_watched *w = &watches[source];
    if (!wanted || w->fd != fd)
        unwatch(w);
    if (wanted && !watch(w, fd, events, &sources[source]))
        eb_keeper_wake_by(eb_now_ms() + RETRY_MS);
}

static void watch_all(int signals, uint64_t now)
{
    want(EB_KEEPER_SIGNALS, true, signals, EPOLLIN);
    if (accept_from > now)
        eb_keeper_wake_by(accept_from);
    want(EB_KEEPER_LISTENER, accept_from <= now && eb_client_count(EB_CLIENT_SERVER) < MOST_SERVERS, EB_LISTENER_FD,
         EPOLLIN);
    want(EB_KEEPER_START, keeper.state == EB_KEEPER_STARTING, keeper.start.done_fd, 0);
    want(EB_KEEPER_NOTIFY, eb_notify_fd() >= 0, eb_notify_fd(), 0);
    for (int i = 0; i < 3; i++) {
        const bool wanted = eb_keeper_has(i) && keeper.hung_until == 0 && (i != 0 || eb_attach_has_typed());
        want(EB_KEEPER_STDIN + (unsigned)i, wanted && keeper.state == EB_KEEPER_RUNNING, keeper.fds[i],
             i == 0 ? EPOLLOUT : EPOLLIN);
        if (keeper.fds[i] >= 0 && (keeper.over >> i & 1)) {
            close(keeper.fds[i]);
            keeper.fds[i] = -1;
        }
    }
}

static void dispatch(const enum eb_keeper_source *source, bool *signalled)
{
    switch (*source) {
    case EB_KEEPER_SIGNALS:
        *signalled = true;
        break;
    case EB_KEEPER_LISTENER:
        accept_servers();
        break;
    case EB_KEEPER_START:
        unwatch(&watches[*source]); /* new processes hold copies, which would keep it in the set */
        if (keeper.state == EB_KEEPER_STARTING)
            eb_kept_started();
        break;
    case EB_KEEPER_NOTIFY:
        unwatch(&watches[*source]);
        eb_notify_started();
        break;
    case EB_KEEPER_STDIN:
        eb_attach_write();
        break;
    case EB_KEEPER_STDOUT:
    case EB_KEEPER_STDERR:
        if (eb_keeper_has((int)(*source - EB_KEEPER_STDIN)))
            eb_kept_read((int)(*source - EB_KEEPER_STDIN));
        break;
    case EB_KEEPER_CLIENT:
        on_client((struct eb_client *)((uintptr_t)source - offsetof(struct eb_client, source)));
        break;
    }
}

static void take_signals(int signals)
{
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof info) > 0)
        ;
    unwatch(&watches[EB_KEEPER_START]); /* the end of the process has decided the start, and closed its descriptor */
    eb_kept_reap();
}

/* -- the end -- */

static bool is_done(void)
{
    if (keeper.state == EB_KEEPER_NEW)
        return eb_client_count(EB_CLIENT_STARTER) == 0 && (keeper.adopted || eb_client_count(EB_CLIENT_SERVER) == 0);
    return keeper.state == EB_KEEPER_OVER && eb_client_count(EB_CLIENT_STARTER) == 0 &&
           eb_client_count(EB_CLIENT_VISITOR) == 0 && eb_notify_fd() < 0;
}

static void trim(void)
{
    eb_ring_trim();
    eb_trim_heap();
    keeper.spawner->trim(0);
}

void eb_keeper_serve(int signals)
{
    struct epoll_event events[32];
    uint64_t busy = 0; /* of eb_now_ms: the time of the last event, if memory has not been given back since */
    for (int i = 0; i < EB_KEEPER_CLIENT; i++)
        watches[i].fd = -1;
    accept_from = 0;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        eb_fatal("epoll");
    for (;;) {
        bool signalled = false;
        const uint64_t now = eb_now_ms();
        keeper.wake = 0;
        for (struct eb_client *c = keeper.clients, *next; c != NULL; c = next) {
            next = c->next;
            take_turn(c, now);
        }
        if (is_done())
            break;
        eb_kept_wake(now);
        eb_attach_wake(now);
        watch_all(signals, now);
        if (keeper.state == EB_KEEPER_OVER)
            eb_keeper_wake_by(keeper.over_ms + keeper.linger_ms);
        if (busy != 0 && now >= busy + TRIM_MS) {
            trim();
            busy = 0;
        }
        if (busy != 0)
            eb_keeper_wake_by(busy + TRIM_MS);
        int n = epoll_wait(epoll_fd, events, sizeof events / sizeof *events,
                           keeper.wake == 0    ? -1
                           : keeper.wake > now ? (int)(keeper.wake - now)
                                               : 0);
        if (n < 0 && errno != EINTR)
            eb_fatal("epoll_wait");
        if (n > 0)
            busy = eb_now_ms();
        for (int i = 0; i < n; i++)
            dispatch(events[i].data.ptr, &signalled);
        if (signalled)
            take_signals(signals);
    }
    close(epoll_fd);
}
