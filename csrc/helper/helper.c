/*
 * errand-boy-helper: serves connections that it is handed over its control socket, and starts the
 * commands that they ask for.  One thread, never waiting but in epoll_wait.
 *
 *   --private         started by the process that it serves: descriptor 4 is that process's pidfd, and new
 *                     processes become that process's children; else it is one of a daemon's
 *   --own-children    keep the children, wait for them and report their ends
 *   --posix-spawn     start through posix_spawn(3); implies --own-children
 *   --max-tasks=N     tell the server after so many starts
 *   --frame-timeout=N milliseconds for the rest of a frame that has begun
 *   --figures         descriptor 4 is a file in memory, for the figures
 *   --open-files=N    the soft limit of open files for commands whose request has none
 *
 * Descriptor 3 is the control socket.  The helper ends when the caller has ended, or when the control
 * socket is at its end and the last connection has gone; a private one also on SIGTERM, when what it does
 * then is done.
 */
#include "helper/service.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <malloc.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    CONTROL_FD = 3,
    CALLER_FD = 4,  /* a caller's own helper */
    FIGURES_FD = 4, /* a daemon's */
    READS_PER_TURN = 16, /* of one connection, before the others have theirs */
    REST_MS = 100,
    HOLD_MS = 10,
    MOST_HELD = 32 << 10,   /* bytes */
    TICK_MS = 40,           /* between looks at what nothing tells of */
    GRAIN_MS = 4,           /* looks are put off to multiples of it, so that few are for one connection only */
    MOST_PEER_GROUPS = 1 << 16,
};

struct eb_service service;
static int epoll_fd, signals_fd;
static bool caller_gone;
static uint64_t frame_timeout_ms = 30000; /* for the rest of a frame that has begun */

static void fatal(const char *what)
{
    fprintf(stderr, "errand-boy-helper: %s: %s\n", what, strerror(errno));
    exit(1);
}

uint64_t eb_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void eb_look_by(uint64_t when)
{
    uint64_t due = (when / GRAIN_MS + 1) * GRAIN_MS;
    if (service.due == 0 || due < service.due)
        service.due = due;
}

/* -- the epoll set -- */

bool eb_watch(struct eb_connection *c, uint32_t events)
{
    if (c->watched && c->events == events)
        return true;
    struct epoll_event event = {.events = events, .data.ptr = &c->source};
    if (epoll_ctl(epoll_fd, c->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event) != 0)
        return false;
    c->watched = true;
    c->events = events;
    return true;
}

/* Removed, not masked: a hang-up is reported whatever the mask says. */
static void unwatch(struct eb_connection *c)
{
    if (c->watched)
        eb_unwatch_fd(c->fd);
    c->watched = false;
}

bool eb_watch_fd(int fd, uint32_t events, enum eb_source *source)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

void eb_unwatch_fd(int fd)
{
    (void)epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
}

/* -- connections -- */

static void add_connection(struct eb_connection *c)
{
    c->next = service.all;
    if (c->next != NULL)
        c->next->previous = c;
    service.all = c;
    if (!c->control)
        service.count++;
}

void eb_release(struct eb_connection *c)
{
    if (c->released || c->fd >= 0 || c->starting || c->child != 0 || c->dying)
        return;
    c->released = true;
    if (c->previous != NULL)
        c->previous->next = c->next;
    else
        service.all = c->next;
    if (c->next != NULL)
        c->next->previous = c->previous;
    if (!c->control) {
        service.count--;
        if (c->granted)
            eb_tell(EB_DONE, c);
        c->granted = false;
        eb_tell(EB_CLOSED, c);
    }
    free(c->peer);
    c->peer = NULL;
    c->previous = NULL;
    c->next = service.dead;
    service.dead = c;
}

void eb_close_connection(struct eb_connection *c)
{
    if (c->fd < 0)
        return;
    unwatch(c);
    if (c->starting) {
        /* The request is still being read: see eb_finish_start. */
        close(c->fd);
        c->fd = -1;
    } else {
        eb_connection_close(c);
        eb_streams_close(c);
    }
    eb_abandon_command(c);
    if (c->control) {
        service.control = NULL;
        eb_server_gone();
    }
    eb_release(c);
}

static void sweep(void)
{
    while (service.dead != NULL) {
        struct eb_connection *c = service.dead;
        service.dead = c->next;
        free(c);
    }
}

/* The kernel's word for who connected; false if it has none. */
static bool identify(struct eb_connection *c, bool as_peer)
{
    struct ucred ucred;
    socklen_t size = sizeof ucred;
    if (getsockopt(c->fd, SOL_SOCKET, SO_PEERCRED, &ucred, &size) != 0)
        return false;
    c->client = ucred.pid;
    c->client_uid = ucred.uid;
    if (!as_peer)
        return true;
    socklen_t groups = 0;
    if (getsockopt(c->fd, SOL_SOCKET, SO_PEERGROUPS, NULL, &groups) != 0 && errno != ERANGE)
        return false;
    if (groups > MOST_PEER_GROUPS * sizeof(gid_t))
        return false;
    c->peer = malloc(sizeof *c->peer + groups);
    if (c->peer == NULL)
        return false;
    if (groups > 0 && getsockopt(c->fd, SOL_SOCKET, SO_PEERGROUPS, c->peer->groups, &groups) != 0)
        return false;
    c->peer->uid = ucred.uid;
    c->peer->gid = ucred.gid;
    c->peer->group_count = (uint32_t)(groups / sizeof(gid_t));
    return true;
}

bool eb_adopt(int fd, uint32_t id, uint8_t flags, bool control)
{
    struct eb_connection *c = calloc(1, sizeof *c);
    if (c == NULL) {
        const struct eb_connection gone = {.id = id};
        close(fd);
        eb_tell(EB_CLOSED, &gone);
        return false;
    }
    *c = (struct eb_connection){
        .source = EB_SOURCE_CONNECTION,
        .start_source = EB_SOURCE_START,
        .stream_sources = {EB_SOURCE_STDIN, EB_SOURCE_STDOUT, EB_SOURCE_STDERR},
        .fd = fd,
        .id = id,
        .control = control,
        .ask = (flags & EB_ASK) != 0,
        .only = service.pool ? NULL : &service.caller,
    };
    c->start.done_fd = c->group_fd = -1;
    add_connection(c);
    if (control)
        service.control = c;

    uint8_t payload[4];
    struct eb_writer hello = eb_writer(payload, sizeof payload);
    eb_put_u32(&hello, EB_VERSION);
    bool known = control || !service.pool || identify(c, (flags & EB_AS_PEER) != 0);
    /* The control socket's peer may have ended its side already: what it sent before counts. */
    if (!known || (!control && !eb_connection_send(c, EB_HELLO, payload, eb_written(&hello))) ||
        !eb_watch(c, c->out_size > 0 ? EPOLLOUT : EPOLLIN)) {
        eb_close_connection(c);
        return false;
    }
    return true;
}

void eb_refuse(struct eb_connection *c, const char *format, ...)
{
    char reason[EB_MAX_REASON];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    size_t size = length < (int)sizeof reason ? (size_t)length : sizeof reason - 1;
    eb_let_go(c);
    if (c->fd >= 0)
        (void)eb_connection_send(c, EB_REFUSED, reason, size);
    eb_close_connection(c);
}

bool eb_is_blocked(const struct eb_connection *c)
{
    return c->out_size > 0 && !c->held;
}

void eb_let_go(struct eb_connection *c)
{
    if (!c->held)
        return;
    c->held = false;
    if (c->fd >= 0 && !eb_connection_flush(c))
        eb_close_connection(c);
}

void eb_reply(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size)
{
    if (c->fd < 0)
        return;
    bool hold = c->brief && !eb_is_blocked(c);
    if (!(hold ? eb_connection_hold : eb_connection_send)(c, kind, payload, size)) {
        eb_close_connection(c);
        return;
    }
    if (hold && !c->held) {
        c->held = true;
        c->held_until = eb_now_ms() + HOLD_MS;
        eb_look_by(c->held_until);
    }
    if (c->held && c->out_size > MOST_HELD)
        eb_let_go(c);
}

/* -- frames -- */

static void on_hello(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t version = eb_get_u32(&r);
    if (version != EB_VERSION) {
        eb_refuse(c, "this helper speaks version %d of the protocol, not %u: one of the two sides is of an older "
                     "release; restart it",
                  EB_VERSION, (unsigned)version);
        return;
    }
    c->greeted = true;
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
}

static const struct rule {
    char name[8];
    bool control; /* on the control socket, else on any other connection */
    uint32_t least, most;
    void (*act)(struct eb_connection *c, const struct eb_frame *frame);
} rules[] = {
    [EB_ADOPT] = {"ADOPT", true, 0, 5, eb_on_adopt},
    [EB_SPAWN] = {"SPAWN", false, 0, EB_MAX_FRAME, eb_on_spawn},
    [EB_SIGNAL] = {"SIGNAL", false, 8, 8, eb_on_signal},
    [EB_DRAIN] = {"DRAIN", true, 0, 0, eb_on_drain},
    [EB_END] = {"END", true, 1, 1, eb_on_end},
    [EB_QUERY] = {"QUERY", true, 0, 0, eb_on_query},
    [EB_GRANT] = {"GRANT", true, 4, 4, eb_on_grant},
    [EB_STDIN] = {"STDIN", false, 0, EB_WINDOW, eb_on_stdin},
};

/*
 * The caller may have fewer rights than this helper by now, and another process may have got hold of its
 * connections: neither may have anything started here.  The kernel's word for the sender has its real ids, so
 * one that can take back the rights which it had may still ask.  Input and signals, on the other hand, concern
 * the connection's live command alone, which closing it would end as well.
 */
static bool may_ask(const struct eb_connection *c, const struct eb_frame *frame)
{
    return !c->foreign || frame->kind == EB_STDIN || frame->kind == EB_SIGNAL;
}

/* Checked as soon as the header is there, so that nobody sends 16 MiB to be told that they are not wanted. */
static bool admitted(struct eb_connection *c, const struct eb_frame *frame)
{
    if (!c->greeted) {
        if (frame->kind == EB_HELLO && frame->size == 4)
            return true;
        eb_refuse(c, "the first frame must be HELLO with a version");
        return false;
    }
    const struct rule *rule = frame->kind < sizeof rules / sizeof *rules ? &rules[frame->kind] : NULL;
    if (rule == NULL || rule->act == NULL)
        eb_refuse(c, "unknown frame kind %u", (unsigned)frame->kind);
    else if (rule->control != c->control)
        eb_refuse(c, "%s is not for this connection", rule->name);
    else if (frame->size < rule->least || frame->size > rule->most)
        eb_refuse(c, "%s with a payload of %u bytes", rule->name, (unsigned)frame->size);
    else if (may_ask(c, frame))
        return true;
    else {
        eb_refuse(c, "%s from another sender than process %d with user id %u and group id %u, which started this helper",
                  rule->name, (int)service.caller.pid, (unsigned)service.caller.uid, (unsigned)service.caller.gid);
        eb_drain();
    }
    return false;
}

void eb_proceed(struct eb_connection *c)
{
    eb_streams_resume(c); /* first: their end may make room for the next SPAWN */
    while (c->fd >= 0 && !c->starting && !c->wanting && !eb_is_blocked(c) && c->in_size > 0) {
        struct eb_frame frame = {0};
        if (!c->opened) {
            if (c->in[c->in_at] != 0) {
                eb_refuse(c, "a framed connection starts with a NUL byte");
                return;
            }
            c->opened = true;
            eb_connection_consume(c, 1);
            continue;
        }
        int whole = eb_connection_frame(c, &frame);
        if (whole < 0) {
            eb_refuse(c, "a frame of more than %d bytes", EB_MAX_FRAME);
            return;
        }
        if (whole == 0 && c->in_size < EB_HEADER_SIZE)
            break;
        if (!admitted(c, &frame))
            return;
        if (whole == 0)
            break;
        c->deadline = 0; /* that of a frame; the next has its own */
        if (frame.kind == EB_HELLO)
            on_hello(c, &frame);
        else
            rules[frame.kind].act(c, &frame);
    }
    if (c->fd < 0)
        return;
    if (c->in_size == 0 && c->fds.count > 0) {
        eb_refuse(c, "%u descriptors that no frame names", (unsigned)c->fds.count);
        return;
    }
    if (c->starting)
        return;
    eb_streams_resume(c);
    if (c->fd < 0)
        return;
    bool waits = c->in_size > 0 && eb_at_rest(c) && !eb_is_blocked(c);
    if (!waits || !service.pool || c->control) {
        c->deadline = 0;
    } else if (c->deadline == 0) {
        c->deadline = eb_now_ms() + frame_timeout_ms;
        eb_look_by(c->deadline);
    }
    if (service.draining && eb_close_if_at_rest(c))
        return;
    if (!eb_watch(c, c->wanting ? 0 : eb_is_blocked(c) ? EPOLLOUT : EPOLLIN))
        eb_close_connection(c);
}

static bool may_read(const struct eb_connection *c)
{
    return !c->starting && !c->wanting && !eb_is_blocked(c);
}

static void on_connection(struct eb_connection *c, uint32_t events)
{
    if (c->fd < 0)
        return;
    if (c->starting) {
        /* More requests, or the peer's end: neither matters before this start is decided. */
        unwatch(c);
        return;
    }
    if (c->wanting) {
        if (events & (EPOLLHUP | EPOLLERR))
            eb_close_connection(c);
        return;
    }
    /* Also on a hang-up, which is reported again and again until the socket is closed. */
    if (eb_is_blocked(c)) {
        if (!eb_connection_flush(c)) {
            eb_close_connection(c);
            return;
        }
        eb_proceed(c);
    }
    for (int i = 0; i < READS_PER_TURN && c->fd >= 0 && may_read(c); i++) {
        int got = eb_connection_fill(c);
        if (got < 0 && c->control && !service.pool) {
            unwatch(c); /* it is closed when it is known what there is to tell, see tell_of_the_end */
            eb_drain();
            return;
        }
        if (got < 0) {
            eb_close_connection(c);
            return;
        }
        if (got == 0)
            break;
        bool drained = c->in_size < c->in_capacity;
        eb_proceed(c);
        if (drained)
            break;
    }
}

static void look_at(struct eb_connection *c, uint64_t now)
{
    if (c->held && now >= c->held_until) {
        eb_let_go(c);
        eb_proceed(c);
    }
    if (c->held)
        eb_look_by(c->held_until);
    if (c->start.quiet)
        eb_look_by(now + TICK_MS);
    if (eb_streams_are_due(c, now))
        eb_proceed(c);
    if (c->deadline == 0)
        return;
    if (now < c->deadline && !(c->dying && eb_command_gone(c))) {
        eb_look_by(c->dying && now + TICK_MS < c->deadline ? now + TICK_MS : c->deadline);
        return;
    }
    c->deadline = 0;
    if (c->dying)
        eb_kill_command(c);
    else
        eb_refuse(c, "the rest of a frame has not come in %llu ms", (unsigned long long)frame_timeout_ms);
}

static void look_at_those_due(void)
{
    if (service.due == 0)
        return;
    uint64_t now = eb_now_ms();
    if (now < service.due)
        return;
    service.due = 0;
    for (struct eb_connection *c = service.all, *next; c != NULL; c = next) {
        next = c->next;
        look_at(c, now);
    }
}

/* -- the loop -- */

#define OWNER_OF(pointer, member) \
    ((struct eb_connection *)(void *)((char *)(pointer)-offsetof(struct eb_connection, member)))

/* The caller has ended. */
static void leave(void)
{
    caller_gone = true;
    eb_unwatch_fd(CALLER_FD);
    for (struct eb_connection *c = service.all, *next; c != NULL; c = next) {
        next = c->next;
        eb_close_connection(c);
    }
}

static void dispatch(enum eb_source *source, uint32_t events, bool *signalled)
{
    switch (*source) {
    case EB_SOURCE_CONNECTION:
        on_connection(OWNER_OF(source, source), events);
        break;
    case EB_SOURCE_START: {
        struct eb_connection *c = OWNER_OF(source, start_source);
        if (c->starting)
            eb_finish_start(c);
        eb_proceed(c);
        break;
    }
    case EB_SOURCE_STDIN:
    case EB_SOURCE_STDOUT:
    case EB_SOURCE_STDERR: {
        int number = (int)(*source - EB_SOURCE_STDIN);
        eb_on_stream(OWNER_OF(source - number, stream_sources), number);
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

/* Whether a command is still to be ended with the caller. */
static bool duties_left(void)
{
    for (const struct eb_connection *c = service.all; c != NULL; c = c->next)
        if (c->dying || (c->on_close && (c->starting || c->child != 0)))
            return true;
    return false;
}

/* Milliseconds to wait for events. */
static int patience(void)
{
    const uint64_t most = service.untidy ? REST_MS : 60 * 1000;
    uint64_t now = service.due != 0 ? eb_now_ms() : 0;
    if (service.due != 0 && service.due < now + most)
        return service.due > now ? (int)(service.due - now) : 0;
    return service.due != 0 || service.untidy ? (int)most : -1;
}

/*
 * A private helper that takes no more requests: its caller may wait for the end, since an exec of a set-user-ID
 * program or a setns() are not what they should be while another process shares the caller's fs.  Commands that
 * are its own may keep it for long, but no fs of the caller's.
 */
static void tell_of_the_end(void)
{
    if (service.count > 0) {
        for (const struct eb_connection *c = service.all; c != NULL; c = c->next)
            if (!c->control && (c->starting || (eb_at_rest(c) && !c->dying)))
                return; /* soon over, or soon more than that */
        (void)syscall(SYS_unshare, CLONE_FS); /* needs no right, and fails only for lack of memory */
        (void)eb_connection_send(service.control, EB_STAYS, NULL, 0);
    }
    eb_close_connection(service.control);
}

static void take_signals(void)
{
    struct signalfd_siginfo infos[2]; /* each is pending once at most */
    ssize_t size = read(signals_fd, infos, sizeof infos);
    for (ssize_t i = 0; i < size / (ssize_t)sizeof *infos; i++)
        if (infos[i].ssi_signo == SIGTERM)
            eb_drain();
    eb_reap();
}

static void serve(void)
{
    struct epoll_event events[64];
    int idle = 0; /* milliseconds without an event, in several waits if looks are due */
    while (service.control != NULL || service.count > 0) {
        bool signalled = false;
        int timeout = patience();
        int n = epoll_wait(epoll_fd, events, 64, timeout);
        idle = n == 0 && service.untidy ? idle + timeout : 0;
        if (idle >= REST_MS) {
            /* At rest after a burst: what it took goes back. */
            malloc_trim(0);
            service.spawner->rest();
            service.untidy = false;
        } else if (n > 1) {
            service.untidy = true;
        }
        if (n < 0 && errno != EINTR)
            fatal("epoll_wait");
        for (int i = 0; i < n; i++)
            dispatch(events[i].data.ptr, events[i].events, &signalled);
        /* Last, since it may finish a start whose own event is in this round, and begin another. */
        if (signalled)
            take_signals();
        eb_notice_starts();
        look_at_those_due();
        if (service.draining && !service.pool && service.control != NULL)
            tell_of_the_end();
        sweep();
        if (caller_gone && !duties_left())
            _exit(0); /* what is being started shares our memory, which stays until they have gone */
    }
}

static void watch_own(int fd, enum eb_source *source)
{
    if (!eb_watch_fd(fd, EPOLLIN, source))
        fatal("epoll_ctl");
}

/* All signals stay blocked for good, so that none but SIGKILL ends the helper in the middle of something: what
 * is typed at the caller's terminal is not for it.  New processes start with none pending. */
static void block_signals(bool private)
{
    sigset_t all, taken;
    sigfillset(&all);
    sigemptyset(&taken);
    sigaddset(&taken, SIGCHLD);
    if (private)
        sigaddset(&taken, SIGTERM); /* from who ends all children of his, and waits for them */
    /* An ignored SIGCHLD, inherited, would reap behind our back. */
    if (sigprocmask(SIG_SETMASK, &all, NULL) != 0 || signal(SIGCHLD, SIG_DFL) == SIG_ERR)
        fatal("signals");
    signals_fd = signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals_fd < 0)
        fatal("signalfd");
}

/* Not by the user's id: root of a container often lacks them. */
static bool capable(unsigned number)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
    return syscall(SYS_capget, &header, data) == 0 && (data[number / 32].effective >> number % 32 & 1) != 0;
}

int main(int argc, char **argv)
{
    static enum eb_source signals_source = EB_SOURCE_SIGNALS, caller_source = EB_SOURCE_CALLER;
    bool private = false, own = false, posix = false, shared = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--private") == 0)
            private = true;
        else if (strcmp(argv[i], "--own-children") == 0)
            own = true;
        else if (strcmp(argv[i], "--posix-spawn") == 0)
            posix = true;
        else if (strcmp(argv[i], "--figures") == 0)
            shared = true;
        else if (strncmp(argv[i], "--open-files=", 13) == 0)
            service.open_files = strtoull(argv[i] + 13, NULL, 10);
        else if (strncmp(argv[i], "--max-tasks=", 12) == 0)
            eb_set_max_tasks(strtoull(argv[i] + 12, NULL, 10));
        else if (strncmp(argv[i], "--frame-timeout=", 16) == 0)
            frame_timeout_ms = strtoull(argv[i] + 16, NULL, 10);
        else {
            fprintf(stderr, "errand-boy-helper: for errand_boy only\n");
            return 2;
        }
    }
    int last = private || shared ? CONTROL_FD + 1 : CONTROL_FD;
    for (int fd = 0; fd <= last; fd++)
        if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
            fatal("descriptors 0 to 4");
    /* What else the server was given is not for the commands. */
#ifdef SYS_close_range
    (void)syscall(SYS_close_range, last + 1, ~0u, 0);
#endif
    if (!private && !eb_keep_figures(shared ? FIGURES_FD : -1))
        fatal("figures");
    if (!private && shared)
        close(FIGURES_FD);
    block_signals(private);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        if (service.open_files == 0)
            service.open_files = files.rlim_cur;
        files.rlim_cur = files.rlim_max;
        if (!posix)
            (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    service.pool = !private;
    service.caller = (struct ucred){.pid = getppid(), .uid = getuid(), .gid = getgid()};
    service.raises_limits = capable(CAP_SYS_RESOURCE);
    service.raises_priority = capable(CAP_SYS_NICE);
    eb_state_read_signals(&service.self);
    eb_state_read(&service.self);
    service.owns_children = !private || own || posix;
    service.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    service.spawner = posix ? NULL : eb_spawner_clone(&service.self, private && !own);
    if (service.spawner == NULL)
        service.spawner = eb_spawner_posix(&service.self);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        fatal("epoll_create1");
    watch_own(signals_fd, &signals_source);
    if (private)
        watch_own(CALLER_FD, &caller_source);
    if (!eb_adopt(CONTROL_FD, 0, 0, true))
        fatal("control socket");
    if (private && !eb_tell_ids())
        fatal("ids");
    serve();
    close(epoll_fd);
    close(signals_fd);
    return 0;
}
