/*
 * One round of the loop:
 *
 *   1. Each event goes to its owner: bytes are read or sent, output is passed on, a start is finished.  After each
 *      event the marked connections have their turn, until no mark is left.
 *   2. All processes that have ended are waited for, and then reported.  This comes after the events, because it may
 *      finish a start whose own event is in this round, and begin the next start in the same memory.
 *   3. Starts that no descriptor reports are checked, and due timers run.
 *   4. Closed objects are freed.  Until here, events of this round may point to them.
 */
#include "helper/loop.h"

#include "common/heap.h"
#include "helper/command.h"
#include "helper/control.h"
#include "helper/frames.h"
#include "helper/queue.h"
#include "helper/rare.h"
#include "helper/streams.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    READS_PER_TURN = 16, /* of one connection, before the others have their turn */
    MOST_FDS = 1024,     /* that a daemon's client may send for its next request */
    TRIM_MS = 100,       /* without an event until memory is given back, */
    KEPT_STARTS = 1,     /* except that of this many starts */
    START_TICK_MS = 40,  /* poll interval for starts that no descriptor reports */
};

static int epoll_fd, signals_fd, caller_fd;
static bool caller_gone;
static struct eb_command *polled; /* commands whose start is under way, and can't or need not be watched */
/* These are freed between two rounds, because events of a round may point to them. */
static struct eb_connection *dead_connections;
static struct eb_command *dead_commands;

/* -- the epoll set -- */

static bool watch_fd(int fd, uint32_t events, enum eb_source *source)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void unwatch_fd(int fd)
{
    (void)epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

/* Watches for `events`; 0 means a hang-up only. */
static bool watch(struct eb_connection *c, uint32_t events)
{
    if (c->watched && c->events == events)
        return true;
    struct epoll_event event = {.events = events, .data.ptr = &c->source};
    if (epoll_ctl(epoll_fd, c->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->channel.fd, &event) != 0)
        return false;
    c->watched = true;
    c->events = events;
    return true;
}

/* This removes the descriptor, because a hang-up is reported whatever the mask says. */
static void unwatch(struct eb_connection *c)
{
    if (c->watched)
        unwatch_fd(c->channel.fd);
    c->watched = false;
}

/* -- a command's streams -- */

/* Whether it waits for the outcome of its command's start, before which nothing else matters. */
static bool is_starting(const struct eb_connection *c)
{
    return c->command != NULL && (c->command->state == EB_STARTING || c->command->state == EB_FAILING);
}

/* Closes the pipes that are over, and watches the others as needed. */
static void sync_streams(struct eb_connection *c)
{
    struct eb_streams *s = c->streams;
    /* Over: the command has ended, and no process holds its output open any more. */
    if (c->command == NULL && (s->fds[1] < 0 || s->over & 2) && (s->fds[2] < 0 || s->over & 4))
        eb_streams_abandon(c);
    for (int i = 0; i < 3; i++) {
        const uint8_t bit = (uint8_t)(1 << i);
        if (s->fds[i] < 0)
            continue;
        bool over = (s->over & bit) != 0, wanted = !over && !is_starting(c) && eb_streams_want(c, i);
        if (wanted != ((s->watched & bit) != 0)) {
            /* Also before a close, because a new process may hold a copy, which would keep the pipe in the set. */
            if (!wanted)
                unwatch_fd(s->fds[i]);
            else if (!watch_fd(s->fds[i], i == 0 ? EPOLLOUT : EPOLLIN, &c->stream_sources[i]))
                c->closing = true;
            s->watched ^= bit;
        }
        if (over) {
            close(s->fds[i]);
            s->fds[i] = -1;
        }
    }
    if (s->over == 7)
        eb_streams_free(c);
}

/* -- commands -- */

static void finish_start(struct eb_command *k)
{
    /* Closing is not enough: other new processes hold copies until they exec, and through these the pipe would go on
     * reporting events for a start that is over. */
    if (k->start.done_fd >= 0)
        unwatch_fd(k->start.done_fd);
    eb_command_started(k);
    if (helper.full)
        eb_tell_empty(EB_FULL);
    helper.full = false;
    if (k->state != EB_FAILING)
        return;
    if (k->connection != NULL && k->connection->streams != NULL)
        sync_streams(k->connection); /* so that it has been cleaned up when the client is told */
    if (k->child == 0)
        eb_command_ended(k);
}

static void release(struct eb_command *k)
{
    if (k->previous != NULL)
        k->previous->next = k->next;
    else
        helper.commands = k->next;
    if (k->next != NULL)
        k->next->previous = k->previous;
    if (k->connection != NULL) {
        k->connection->command = NULL;
        k->connection->spare = k;
        return;
    }
    helper.count--;
    eb_tell(EB_CLOSED, k->connection_id);
    k->next = dead_commands;
    dead_commands = k;
}

static void begin(struct eb_command *k)
{
    eb_command_begin(k);
    /* This may fail for lack of memory, or of the user's watches. */
    if (k->start.polled || (k->start.done_fd >= 0 && !watch_fd(k->start.done_fd, 0, &k->source))) {
        k->next_polled = polled;
        polled = k;
        eb_wake_by(eb_now_ms());
    }
}

/* Does what a command needs from the loop. */
static void attend(struct eb_command *k)
{
    if (k->state == EB_REQUESTED && k->connection->asks && !k->asked && helper.control != NULL) {
        k->asked = true;
        k->state = EB_WAITING;
        eb_tell(EB_WANT, k->connection_id);
    }
    if (k->state == EB_REQUESTED)
        begin(k);
    if (k->state == EB_STARTING && k->start.done_fd < 0 && !k->start.polled)
        finish_start(k);
    if (k->state != EB_OVER)
        return;
    /* A dropped request is not reported as an ended command. */
    if (k->record != NULL && (k->start.pid != 0 || k->start.error != 0))
        eb_tell_end(k);
    free(k->record);
    k->record = NULL;
    if (k->asked)
        eb_tell(EB_DONE, k->connection_id);
    k->asked = false;
    if (!k->dying)
        release(k);
}

/* Called when the state of a command has changed: its connection has its turn, or the command alone if that has
 * ended. */
static void touch(struct eb_command *k)
{
    if (k->connection != NULL)
        eb_mark(k->connection);
    else
        attend(k);
}

/* Finishes the polled starts whose outcome is known. */
static void look_at_polled(void)
{
    for (struct eb_command **at = &polled, *k; (k = *at) != NULL;) {
        if (k->state == EB_STARTING && !helper.spawner->is_decided(&k->start)) {
            at = &k->next_polled;
            continue;
        }
        *at = k->next_polled;
        if (k->state == EB_STARTING) {
            finish_start(k);
            touch(k);
        }
    }
}

static pid_t wait_for_child(int *status, struct rusage *usage)
{
    siginfo_t info = {.si_pid = 0};
    if (!helper.ends_groups)
        return wait4(-1, status, WNOHANG, usage);
    if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0)
        return 0;
    eb_command_end_group(info.si_pid);
    return wait4(info.si_pid, status, WNOHANG, usage);
}

/* Waits for all ended processes before it reports any of them, because a report may lead to new ones. */
static void reap(void)
{
    struct eb_command *first = NULL, **last = &first, *k;
    struct rusage usage;
    int status;
    pid_t pid;
    while ((pid = wait_for_child(&status, &usage)) > 0)
        if ((k = eb_command_reap(pid, status, &usage)) != NULL) {
            *last = k;
            last = &k->next_child;
        }
    while ((k = first) != NULL) {
        first = k->next_child;
        /* The process may have come and gone before its start was noticed; the outcome is known by now. */
        if (k->state == EB_STARTING)
            finish_start(k);
        eb_command_ended(k);
        touch(k);
    }
}

/* -- connections -- */

/* Whether the loop may take more of its frames. */
static bool takes_frames(const struct eb_connection *c)
{
    return !c->closing && !eb_is_blocked(c) && (c->command == NULL || c->command->state == EB_RUNNING);
}

static void close_connection(struct eb_connection *c)
{
    struct eb_command *k = c->command;
    unwatch(c);
    eb_streams_abandon(c);
    if (c->streams != NULL)
        sync_streams(c);
    eb_queue_leave(c, true);
    if (k != NULL)
        eb_command_orphan(k);
    eb_connection_close(c);
    if (c->previous != NULL)
        c->previous->next = c->next;
    else
        helper.connections = c->next;
    if (c->next != NULL)
        c->next->previous = c->previous;
    c->next = dead_connections;
    dead_connections = c;
    if (c->control) {
        helper.control = NULL;
        eb_server_gone();
    } else if (k != NULL) {
        attend(k);
    } else {
        helper.count--;
        eb_tell(EB_CLOSED, c->id);
    }
}

static void sweep(void)
{
    struct eb_connection *c;
    struct eb_command *k;
    while ((c = dead_connections) != NULL) {
        dead_connections = c->next;
        free(c);
    }
    while ((k = dead_commands) != NULL) {
        dead_commands = k->next;
        free(k);
    }
}

/* -- a connection's turn -- */

/* Sets the time by which the rest of a frame must come. */
static void set_frame_deadline(struct eb_connection *c)
{
    if (c->channel.in_size == 0 || !eb_is_at_rest(c) || eb_is_blocked(c) || !helper.pool || c->control) {
        c->frame_deadline = 0;
    } else if (c->frame_deadline == 0) {
        c->frame_deadline = eb_now_ms() + helper.frame_timeout_ms;
        eb_wake_by(c->frame_deadline);
    }
}

/* Has an idle connection closed, because the helper takes no more commands. */
static void close_if_at_rest(struct eb_connection *c)
{
    if (c->control || !eb_is_at_rest(c) || c->channel.in_size > 0 || c->channel.out_size > 0)
        return;
    /* A request may come between our last read and the close.  The kernel tells its sender of unread bytes, but that
     * is not enough if input followed the request: perhaps only the input was not read. */
    if (!helper.pool)
        eb_reply(c, EB_UNREAD, NULL, 0);
    c->closing = true;
}

/* No frame may come with descriptors while a command runs. */
static void check_fds(struct eb_connection *c)
{
    if (c->channel.fds.count > 0 && (c->channel.in_size == 0 || (!c->control && !eb_is_at_rest(c))))
        eb_refuse(c, "%u descriptors that no frame names", (unsigned)c->channel.fds.count);
    else if (helper.pool && !c->control && c->channel.fds.count > MOST_FDS)
        eb_refuse(c, "more than %d descriptors", MOST_FDS);
}

/* Handles at most one frame, so that its effects on other objects precede the next frame: a DRAIN before a QUERY. */
static void step(struct eb_connection *c)
{
    if (!c->closing && c->command != NULL)
        attend(c->command);
    if (!c->closing && c->streams != NULL)
        sync_streams(c);
    if (!c->closing && eb_is_at_rest(c)) {
        eb_queue_leave(c, false);
        eb_uncork(c);
        c->coalesces = false;
    }
    if (takes_frames(c) && eb_take_frame(c)) {
        eb_mark(c);
        return;
    }
    if (takes_frames(c))
        check_fds(c);
    if (!c->closing && helper.draining)
        close_if_at_rest(c);
    if (!c->closing && !is_starting(c) && !c->ended) {
        bool waits = c->command != NULL && c->command->state == EB_WAITING;
        set_frame_deadline(c);
        if (!watch(c, waits ? 0 : eb_is_blocked(c) ? EPOLLOUT : EPOLLIN))
            c->closing = true;
    }
    if (c->closing)
        close_connection(c);
}

static void act_on_marks(void)
{
    while (helper.marked != NULL) {
        struct eb_connection *c = helper.marked;
        helper.marked = c->next_marked;
        c->marked = false;
        if (c->channel.fd >= 0)
            step(c);
    }
}

/* -- events -- */

static void on_connection(struct eb_connection *c, uint32_t events)
{
    if (c->channel.fd < 0)
        return;
    if (is_starting(c)) {
        /* More requests, or the peer's end; neither matters before this start is decided. */
        unwatch(c);
        return;
    }
    /* This is right for a hang-up too, which is reported again and again until the socket is closed. */
    if (eb_is_blocked(c)) {
        eb_connection_flush(c);
        eb_mark(c);
        act_on_marks();
    } else if (c->command != NULL && c->command->state == EB_WAITING && events & (EPOLLHUP | EPOLLERR)) {
        eb_mark_closing(c);
    }
    for (int i = 0; i < READS_PER_TURN && takes_frames(c); i++) {
        int got = eb_connection_fill(c);
        if (got == 0)
            return;
        if (got < 0 && c->control && !helper.pool) {
            c->ended = true; /* closed after its last frames, see tell_of_the_end */
            unwatch(c);
            eb_drain();
            return;
        }
        if (got < 0) {
            eb_mark_closing(c);
            return;
        }
        bool drained = eb_channel_is_drained(&c->channel);
        eb_mark(c);
        act_on_marks();
        if (drained)
            return;
    }
}

/* Called when the caller has ended. */
static void leave(void)
{
    caller_gone = true;
    unwatch_fd(caller_fd);
    for (struct eb_connection *c = helper.connections; c != NULL; c = c->next)
        eb_mark_closing(c);
}

/* Whether a command must still be ended with the caller. */
static bool has_duties(void)
{
    for (const struct eb_command *k = helper.commands; k != NULL; k = k->next)
        if (k->dying || (k->on_close && (k->state == EB_STARTING || k->state == EB_RUNNING)))
            return true;
    return false;
}

/*
 * For a private helper that takes no more requests.  Its caller may be waiting for its end, because an exec of a
 * set-user-ID program, or a setns(), does not work as it should while another process shares the caller's fs.  The
 * helper's own commands may keep it alive for long, so it stops sharing the fs.
 */
static void tell_of_the_end(void)
{
    if (helper.count > 0) {
        for (const struct eb_command *k = helper.commands; k != NULL; k = k->next)
            if (k->state < EB_RUNNING)
                return; /* it will soon be over, or running */
        for (const struct eb_connection *c = helper.connections; c != NULL; c = c->next)
            if (!c->control && eb_is_at_rest(c))
                return;
        (void)syscall(SYS_unshare, CLONE_FS); /* needs no privilege, and fails only for lack of memory */
        eb_tell_empty(EB_STAYS);
    }
    eb_mark_closing(helper.control);
}

static void take_signals(void)
{
    struct signalfd_siginfo infos[2]; /* each is pending once at most */
    ssize_t size = read(signals_fd, infos, sizeof infos);
    for (ssize_t i = 0; i < size / (ssize_t)sizeof *infos; i++)
        if (infos[i].ssi_signo == SIGTERM)
            eb_drain();
    reap();
}

#define OWNER_OF(type, pointer, member) ((struct type *)(void *)((char *)(pointer) - offsetof(struct type, member)))

static void dispatch(enum eb_source *source, uint32_t events, bool *signalled)
{
    switch (*source) {
    case EB_SOURCE_CONNECTION:
        on_connection(OWNER_OF(eb_connection, source, source), events);
        break;
    case EB_SOURCE_START: {
        struct eb_command *k = OWNER_OF(eb_command, source, source);
        if (k->state == EB_STARTING) {
            finish_start(k);
            touch(k);
        }
        break;
    }
    case EB_SOURCE_STDIN:
    case EB_SOURCE_STDOUT:
    case EB_SOURCE_STDERR: {
        int number = (int)(*source - EB_SOURCE_STDIN);
        eb_on_stream(OWNER_OF(eb_connection, source - number, stream_sources), number);
        break;
    }
    case EB_SOURCE_SIGNALS:
        *signalled = true;
        break;
    case EB_SOURCE_CALLER:
        leave();
        break;
    }
}

/* -- time -- */

static void wake_connection(struct eb_connection *c, uint64_t now)
{
    if (c->corked && now >= c->corked_until) {
        eb_uncork(c);
        eb_mark(c);
    } else if (c->corked) {
        eb_wake_by(c->corked_until);
    }
    eb_streams_wake(c, now);
    if (c->frame_deadline != 0 && now >= c->frame_deadline)
        eb_refuse(c, "the rest of a frame has not come in %llu ms", (unsigned long long)helper.frame_timeout_ms);
    else if (c->frame_deadline != 0)
        eb_wake_by(c->frame_deadline);
}

static void wake_those_due(void)
{
    uint64_t now = helper.next_wake != 0 ? eb_now_ms() : 0;
    if (helper.next_wake == 0 || now < helper.next_wake)
        return;
    helper.next_wake = 0;
    eb_queue_wake(now);
    for (struct eb_connection *c = helper.connections; c != NULL; c = c->next)
        wake_connection(c, now);
    for (struct eb_command *k = helper.commands, *next; k != NULL; k = next) {
        next = k->next;
        eb_command_wake(k, now);
        if (k->connection == NULL)
            attend(k);
    }
    if (polled != NULL)
        eb_wake_by(now + START_TICK_MS);
}

/* Milliseconds to wait for events. */
static int time_to_wait(void)
{
    const uint64_t most = helper.needs_trim ? TRIM_MS : 60 * 1000;
    uint64_t now = helper.next_wake != 0 ? eb_now_ms() : 0;
    if (helper.next_wake != 0 && helper.next_wake < now + most)
        return helper.next_wake > now ? (int)(helper.next_wake - now) : 0;
    return helper.next_wake != 0 || helper.needs_trim ? (int)most : -1;
}

void eb_serve(int signals, int caller)
{
    static enum eb_source signals_source = EB_SOURCE_SIGNALS, caller_source = EB_SOURCE_CALLER;
    struct epoll_event events[64];
    int idle = 0; /* milliseconds without an event, over several waits if timers were due */
    signals_fd = signals;
    caller_fd = caller;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || !watch_fd(signals, EPOLLIN, &signals_source) ||
        (caller >= 0 && !watch_fd(caller, EPOLLIN, &caller_source)))
        eb_fatal("epoll");
    act_on_marks();
    while (helper.control != NULL || helper.count > 0) {
        bool signalled = false;
        int timeout = time_to_wait();
        int n = epoll_wait(epoll_fd, events, 64, timeout);
        idle = n == 0 && helper.needs_trim ? idle + timeout : 0;
        if (idle >= TRIM_MS) {
            /* The helper is idle after a burst: give back its memory. */
            eb_trim_heap();
            eb_drop_rare_text();
            helper.spawner->trim(KEPT_STARTS);
            helper.needs_trim = false;
        } else if (n > 1) {
            helper.needs_trim = true;
        }
        if (n < 0 && errno != EINTR)
            eb_fatal("epoll_wait");
        for (int i = 0; i < n; i++) {
            dispatch(events[i].data.ptr, events[i].events, &signalled);
            act_on_marks();
        }
        if (signalled)
            take_signals();
        look_at_polled();
        wake_those_due();
        act_on_marks();
        if (helper.draining && !helper.pool && helper.control != NULL) {
            tell_of_the_end();
            act_on_marks();
        }
        sweep();
        if (caller_gone && !has_duties())
            _exit(0); /* processes that are being started share our memory, which stays until they have left it */
    }
    close(epoll_fd);
    close(signals_fd);
}
