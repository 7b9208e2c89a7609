/*
 * errand-boy-helper: serves connections that it is handed over its control socket, and starts the
 * commands that they ask for.  One thread, never waiting but in epoll_wait.
 *
 *   --private         started by the process that it serves: descriptor 4 is that process's pidfd, and new
 *                     processes become that process's children
 *   --own-children    keep the children, wait for them and report their ends
 *   --posix-spawn     start through posix_spawn(3); implies --own-children
 *
 * Descriptor 3 is the control socket.  The helper ends when the caller has ended, or when the control
 * socket is at its end and the last connection has gone.
 */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "connection.h"

enum {
    CONTROL_FD = 3,
    CALLER_FD = 4,
    READS_PER_TURN = 16, /* of one connection, before the others have theirs */
    CHILD_BUCKETS = 1024,
    REST_MS = 100,
};

static struct eb_state self;
static const struct eb_spawner *spawner;
static int epoll_fd, children_fd;
static bool ending;
static unsigned open_connections;
static bool untidy; /* several connections have been at work at once */
static struct eb_connection *closed; /* kept while events, a start or a child may still point to them */
static struct eb_connection *children[CHILD_BUCKETS];

static void fatal(const char *what)
{
    fprintf(stderr, "errand-boy-helper: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* -- the epoll set -- */

static bool watch(struct eb_connection *c, bool hungry)
{
    if (c->watched && c->hungry == hungry)
        return true;
    struct epoll_event event = {.events = hungry ? EPOLLOUT : EPOLLIN, .data.ptr = &c->source};
    if (epoll_ctl(epoll_fd, c->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event) != 0)
        return false;
    c->watched = true;
    c->hungry = hungry;
    return true;
}

/* Removed, not masked: a hang-up is reported whatever the mask says. */
static void unwatch(struct eb_connection *c)
{
    if (c->watched)
        epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    c->watched = false;
}

/* -- connections -- */

static void close_connection(struct eb_connection *c)
{
    if (c->fd < 0)
        return;
    if (c->control)
        ending = true;
    unwatch(c);
    if (c->starting) {
        /* The request is still being read: see finish_start. */
        close(c->fd);
        c->fd = -1;
    } else {
        eb_connection_close(c);
    }
    open_connections--;
    c->next = closed;
    closed = c;
}

/* Frees what nothing needs any more.  Between two rounds of events only, since they point to it. */
static void sweep(void)
{
    struct eb_connection **at = &closed;
    while (*at != NULL) {
        struct eb_connection *c = *at;
        if (c->starting || c->child != 0) {
            at = &c->next;
        } else {
            *at = c->next;
            free(c);
        }
    }
}

static bool adopt(int fd, bool control)
{
    struct eb_connection *c = calloc(1, sizeof *c);
    if (c == NULL) {
        close(fd);
        return false;
    }
    *c = (struct eb_connection){
        .source = EB_SOURCE_CONNECTION, .start_source = EB_SOURCE_START, .fd = fd, .control = control};
    c->start.done_fd = -1;
    open_connections++;

    uint8_t payload[4];
    struct eb_writer hello = eb_writer(payload, sizeof payload);
    eb_put_u32(&hello, EB_VERSION);
    /* The control socket's peer may have ended its side already: what it sent before counts. */
    if ((!control && !eb_connection_send(c, EB_HELLO, &hello)) || !watch(c, c->out_size > 0)) {
        close_connection(c);
        return false;
    }
    return true;
}

/* The reason is sent if the socket takes it at once; a peer that sends what it may not is owed no more. */
static void refuse(struct eb_connection *c, const char *format, ...)
{
    char reason[EB_MAX_REASON];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    struct eb_writer w = eb_writer(reason, sizeof reason);
    w.at += length < (int)sizeof reason ? length : (int)sizeof reason - 1;
    (void)eb_connection_send(c, EB_REFUSED, &w);
    close_connection(c);
}

static void reply(struct eb_connection *c, enum eb_kind kind, const struct eb_writer *payload)
{
    if (c->fd >= 0 && !eb_connection_send(c, kind, payload))
        close_connection(c);
}

/* -- children -- */

static struct eb_connection **child_bucket(pid_t pid)
{
    return &children[(unsigned)pid % CHILD_BUCKETS];
}

static void add_child(struct eb_connection *c, pid_t pid)
{
    struct eb_connection **bucket = child_bucket(pid);
    c->child = pid;
    c->next_child = *bucket;
    *bucket = c;
}

static struct eb_connection *remove_child(pid_t pid)
{
    for (struct eb_connection **at = child_bucket(pid); *at != NULL; at = &(*at)->next_child)
        if ((*at)->child == pid) {
            struct eb_connection *c = *at;
            *at = c->next_child;
            c->child = 0;
            return c;
        }
    return NULL;
}

static void report_start(struct eb_connection *c)
{
    uint8_t payload[16];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    if (c->start.error == 0) {
        eb_put_u32(&w, (uint32_t)c->start.pid);
        eb_put_u8(&w, c->start.owner);
        reply(c, EB_SPAWNED, &w);
    } else {
        eb_put_u32(&w, c->start.owner == EB_OWNER_CALLER ? (uint32_t)c->start.pid : 0);
        eb_put_u32(&w, (uint32_t)c->start.error);
        eb_put_u8(&w, c->start.stage);
        reply(c, EB_FAILED, &w);
    }
}

static void finish_start(struct eb_connection *c)
{
    struct eb_frame frame;
    /* Closing is not enough: other new processes hold copies of it until they exec, and with them it would
     * go on to report events, for a start that is over. */
    if (c->start.done_fd >= 0)
        (void)epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->start.done_fd, NULL);
    spawner->end(&c->start);
    c->starting = false;
    if (c->start.error != 0 && c->child != 0) {
        /* Its descriptors are closed already, so it is ending and this wait is short.  No EXITED: its
         * client is told why it failed. */
        (void)waitpid(c->child, NULL, 0);
        (void)remove_child(c->child);
    }
    eb_request_free(&c->request);
    if (c->fd < 0) {
        eb_connection_close(c);
    } else {
        if (eb_connection_frame(c, &frame) == 1)
            eb_connection_consume(c, EB_HEADER_SIZE + frame.size);
        report_start(c);
    }
}

static void report_end(struct eb_connection *c, int status, const struct rusage *used)
{
    uint8_t payload[4 + 9 * 8];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, (uint32_t)status);
    eb_put_u64(&w, (uint64_t)used->ru_utime.tv_sec * 1000000 + (uint64_t)used->ru_utime.tv_usec);
    eb_put_u64(&w, (uint64_t)used->ru_stime.tv_sec * 1000000 + (uint64_t)used->ru_stime.tv_usec);
    eb_put_u64(&w, (uint64_t)used->ru_maxrss);
    eb_put_u64(&w, (uint64_t)used->ru_minflt);
    eb_put_u64(&w, (uint64_t)used->ru_majflt);
    eb_put_u64(&w, (uint64_t)used->ru_inblock);
    eb_put_u64(&w, (uint64_t)used->ru_oublock);
    eb_put_u64(&w, (uint64_t)used->ru_nvcsw);
    eb_put_u64(&w, (uint64_t)used->ru_nivcsw);
    reply(c, EB_EXITED, &w);
}

static void proceed(struct eb_connection *c);

static void reap(void)
{
    struct signalfd_siginfo info;
    (void)!read(children_fd, &info, sizeof info);
    struct rusage used;
    int status;
    pid_t pid;
    while ((pid = wait4(-1, &status, WNOHANG, &used)) > 0) {
        struct eb_connection *c = remove_child(pid);
        if (c == NULL)
            continue;
        /* It may have come and gone before its start was noticed; the pipe has hung up by now. */
        bool told = !c->starting;
        if (!told)
            finish_start(c);
        if (told || c->start.error == 0)
            report_end(c, status, &used);
        proceed(c);
    }
}

/* -- frames -- */

static void on_hello(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t version = eb_get_u32(&r);
    if (version != EB_VERSION) {
        refuse(c, "this helper speaks version %d of the protocol, not %u: one of the two sides is of an older "
                  "release; restart it",
               EB_VERSION, (unsigned)version);
        return;
    }
    c->greeted = true;
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
}

static void on_adopt(struct eb_connection *c, const struct eb_frame *frame)
{
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
    if (c->fds.count == 0) {
        /* Out of descriptors: the other end of what was dropped reads end-of-file before any HELLO. */
        if (!c->fds.lost)
            refuse(c, "ADOPT came without a descriptor");
        eb_fds_clear(&c->fds);
        return;
    }
    int fd = c->fds.at[0];
    c->fds.count--;
    memmove(c->fds.at, c->fds.at + 1, c->fds.count * sizeof *c->fds.at);
    (void)adopt(fd, false);
}

static void fail_start(struct eb_connection *c, const struct eb_frame *frame, int error, enum eb_stage stage)
{
    c->start = (struct eb_start){.done_fd = -1, .error = error, .stage = stage};
    /* Those behind them belong to the next frame, unless the order is lost. */
    if (c->fds.lost || c->fds.count < eb_request_fds(&c->request))
        eb_fds_clear(&c->fds);
    else
        eb_fds_drop(&c->fds, eb_request_fds(&c->request));
    eb_request_free(&c->request);
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
    report_start(c);
}

static void on_spawn(struct eb_connection *c, const struct eb_frame *frame)
{
    char reason[EB_MAX_REASON];
    if (c->child != 0) {
        refuse(c, "SPAWN while this connection's command %d is running", (int)c->child);
        return;
    }
    int error = eb_request_parse(&c->request, frame->payload, frame->size, reason);
    if (error < 0) {
        refuse(c, "malformed SPAWN: %s", reason);
        return;
    }
    if (error > 0) {
        fail_start(c, frame, error, EB_STAGE_EXEC);
        return;
    }
    if (c->fds.lost) {
        fail_start(c, frame, EMFILE, EB_STAGE_FDS);
        return;
    }
    if (c->fds.count < eb_request_fds(&c->request)) {
        refuse(c, "malformed SPAWN: %u descriptors named, %u sent", (unsigned)eb_request_fds(&c->request),
               (unsigned)c->fds.count);
        return;
    }
    if (c->fds.count > 0)
        memcpy(c->request.sources, c->fds.at, eb_request_fds(&c->request) * sizeof(int));
    spawner->begin(&c->start, &c->request);
    c->starting = true;
    eb_fds_drop(&c->fds, eb_request_fds(&c->request)); /* the new process has its own by now */
    if (c->start.pid > 0 && c->start.owner == EB_OWNER_HELPER)
        add_child(c, c->start.pid);
    if (c->start.done_fd < 0) {
        finish_start(c);
        return;
    }
    struct epoll_event event = {.events = 0, .data.ptr = &c->start_source};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->start.done_fd, &event) != 0) {
        /* Out of memory or watches: wait for this one here rather than lose it. */
        char byte;
        (void)!read(c->start.done_fd, &byte, 1);
        finish_start(c);
    }
}

static void on_signal(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    pid_t pid = (pid_t)eb_get_u32(&r);
    int number = (int)eb_get_u32(&r);
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
    /* Not yet waited for, so the pid is still its own.  A signal may cross with EXITED: then it is late,
     * as it would be with kill(2). */
    if (c->child != 0 && c->child == pid)
        (void)kill(pid, number);
}

static const struct rule {
    const char *name;
    bool control; /* on the control socket, else on any other connection */
    uint32_t least, most;
    void (*act)(struct eb_connection *c, const struct eb_frame *frame);
} rules[] = {
    [EB_ADOPT] = {"ADOPT", true, 0, 0, on_adopt},
    [EB_SPAWN] = {"SPAWN", false, 0, EB_MAX_FRAME, on_spawn},
    [EB_SIGNAL] = {"SIGNAL", false, 8, 8, on_signal},
};

/* Checked as soon as the header is there, so that nobody sends 16 MiB to be told that they are not wanted. */
static bool admitted(struct eb_connection *c, const struct eb_frame *frame)
{
    if (!c->greeted) {
        if (frame->kind == EB_HELLO && frame->size == 4)
            return true;
        refuse(c, "the first frame must be HELLO with a version");
        return false;
    }
    const struct rule *rule = frame->kind < sizeof rules / sizeof *rules ? &rules[frame->kind] : NULL;
    if (rule == NULL || rule->act == NULL)
        refuse(c, "unknown frame kind %u", (unsigned)frame->kind);
    else if (rule->control != c->control)
        refuse(c, "%s is not for this connection", rule->name);
    else if (frame->size < rule->least || frame->size > rule->most)
        refuse(c, "%s with a payload of %u bytes", rule->name, (unsigned)frame->size);
    else
        return true;
    return false;
}

/* Acts on the frames that have come whole, as far as the connection's state lets it. */
static void proceed(struct eb_connection *c)
{
    while (c->fd >= 0 && !c->starting && c->out_size == 0 && c->in_size > 0) {
        struct eb_frame frame = {0};
        if (!c->opened) {
            if (c->in[0] != 0) {
                refuse(c, "a framed connection starts with a NUL byte");
                return;
            }
            c->opened = true;
            eb_connection_consume(c, 1);
            continue;
        }
        int whole = eb_connection_frame(c, &frame);
        if (whole < 0) {
            refuse(c, "a frame of more than %d bytes", EB_MAX_FRAME);
            return;
        }
        if (whole == 0 && c->in_size < EB_HEADER_SIZE)
            break;
        if (!admitted(c, &frame))
            return;
        if (whole == 0)
            break;
        if (frame.kind == EB_HELLO)
            on_hello(c, &frame);
        else
            rules[frame.kind].act(c, &frame);
    }
    if (c->fd < 0)
        return;
    if (c->in_size == 0 && c->fds.count > 0) {
        refuse(c, "%u descriptors that no frame names", (unsigned)c->fds.count);
        return;
    }
    if (!c->starting && !watch(c, c->out_size > 0))
        close_connection(c);
}

static void on_connection(struct eb_connection *c)
{
    if (c->fd < 0)
        return;
    if (c->starting) {
        /* More requests, or the peer's end: neither matters before this start is decided. */
        unwatch(c);
        return;
    }
    /* Also on a hang-up, which is reported again and again until the socket is closed. */
    if (c->out_size > 0) {
        if (!eb_connection_flush(c)) {
            close_connection(c);
            return;
        }
        proceed(c);
    }
    for (int i = 0; i < READS_PER_TURN && c->fd >= 0 && !c->starting && c->out_size == 0; i++) {
        int got = eb_connection_fill(c);
        if (got < 0) {
            close_connection(c);
            return;
        }
        if (got == 0)
            break;
        bool drained = c->in_size < c->in_capacity;
        proceed(c);
        if (drained)
            break;
    }
}

/* -- the loop -- */

#define OWNER_OF(pointer, member) \
    ((struct eb_connection *)(void *)((char *)(pointer)-offsetof(struct eb_connection, member)))

static bool done(void)
{
    return ending && open_connections == 0 && closed == NULL;
}

static void serve(void)
{
    struct epoll_event events[64];
    while (!done()) {
        bool child_ended = false;
        int n = epoll_wait(epoll_fd, events, 64, untidy ? REST_MS : -1);
        if (n == 0) {
            /* At rest after a burst: what it took goes back. */
            malloc_trim(0);
            untidy = false;
        } else if (n > 1) {
            untidy = true;
        }
        if (n < 0 && errno != EINTR)
            fatal("epoll_wait");
        for (int i = 0; i < n; i++) {
            enum eb_source *source = events[i].data.ptr;
            switch (*source) {
            case EB_SOURCE_CONNECTION:
                on_connection(OWNER_OF(source, source));
                break;
            case EB_SOURCE_START: {
                struct eb_connection *c = OWNER_OF(source, start_source);
                finish_start(c);
                proceed(c);
                break;
            }
            case EB_SOURCE_CHILDREN:
                child_ended = true;
                break;
            case EB_SOURCE_CALLER:
                /* What is being started shares our memory; it stays until they have gone. */
                _exit(0);
            }
        }
        /* Last, since it may finish a start whose own event is in this round, and begin another. */
        if (child_ended)
            reap();
        sweep();
    }
}

static void watch_fd(int fd, enum eb_source *source)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        fatal("epoll_ctl");
}

/* All signals stay blocked for good: none can end the helper but SIGKILL, and new processes start with
 * none pending. */
static void block_signals(void)
{
    sigset_t all, child;
    sigfillset(&all);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    /* An ignored SIGCHLD, inherited, would reap behind our back. */
    if (sigprocmask(SIG_SETMASK, &all, NULL) != 0 || signal(SIGCHLD, SIG_DFL) == SIG_ERR)
        fatal("signals");
    children_fd = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    if (children_fd < 0)
        fatal("signalfd");
}

int main(int argc, char **argv)
{
    static enum eb_source children_source = EB_SOURCE_CHILDREN, caller_source = EB_SOURCE_CALLER;
    bool private = false, own = false, posix = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--private") == 0)
            private = true;
        else if (strcmp(argv[i], "--own-children") == 0)
            own = true;
        else if (strcmp(argv[i], "--posix-spawn") == 0)
            posix = true;
        else {
            fprintf(stderr, "errand-boy-helper: it is started by errand_boy, not by hand\n");
            return 2;
        }
    }
    block_signals();
    for (int fd = 0; fd <= CALLER_FD; fd++)
        if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 && (fd <= CONTROL_FD || private))
            fatal("descriptors 0 to 4");
    struct rlimit files;
    if (!posix && getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    eb_state_read_signals(&self);
    eb_state_read(&self);
    spawner = posix ? NULL : eb_spawner_clone(&self, private && !own);
    if (spawner == NULL)
        spawner = eb_spawner_posix(&self);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        fatal("epoll_create1");
    watch_fd(children_fd, &children_source);
    if (private)
        watch_fd(CALLER_FD, &caller_source);
    if (!adopt(CONTROL_FD, true))
        fatal("control socket");
    serve();
    close(epoll_fd);
    close(children_fd);
    return 0;
}
