/*
 * Fuzzes a daemon's helper: its loop, all of its states, and what it tells the server and its clients.  The loop runs
 * in this process.  Its sockets, pipes and epoll set are real; the clock, processes and signals are simulated.  An
 * input is a script: each time the loop waits, the harness takes the next step, until there are no more; then all
 * clients leave and all commands end, and so must the loop.
 *
 *     tests/fuzz/run 600      # ten minutes, with libFuzzer
 *
 * With random_scripts.c instead of libFuzzer, it takes a seed and a number of scripts.
 */
#include "fuzz_helper.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include "../c/check.h"
#include "helper/command.h"
#include "helper/control.h"
#include "helper/counters.h"
#include "helper/loop.h"
#include "spawn/supervisor.h"

/* In this file, these are the real functions. */
#undef epoll_wait
#undef clock_gettime
#undef kill
#undef wait4
#undef syscall

#include "script.h"

enum { CLIENTS = 8, CHILDREN = 32, FIRST_PID = 1000, BUFFER = 1 << 18 };

struct client {
    int fd; /* -1: not connected yet, or gone */
    uint32_t id;
    bool greeted, refused, wanting, closed;
    unsigned requests, outcomes, ends;
    uint8_t *in; /* the part of the next frame that has come */
    size_t in_size;
};

enum child_state { FREE, MADE, RUNS, FAILED, GONE, REAPED };

struct child {
    enum child_state state;
    pid_t pid;
    int status, error;
    int done; /* our end of the pipe that reports the outcome; -1: none */
    int fds[3];
    int pidfd;                        /* for the helper's signals to the group; -1: none */
    bool group;                       /* its group has other members */
    bool stubborn;                    /* ignores SIGTERM */
    struct eb_supervisor *supervisor; /* if this is a guard, its supervisor; NULL: this is a command */
};

static struct client clients[CLIENTS];
static struct child children[CHILDREN];
static struct client server; /* the other end of the control socket */
static unsigned client_count;
static pid_t last_pid;
static int signals[2];
static bool signalled;

/* -- the kernel that the helper sees -- */

static void end_child(struct child *k, int status)
{
    const struct signalfd_siginfo info = {.ssi_signo = SIGCHLD};
    if (k->state < MADE || k->state > FAILED)
        return;
    k->status = k->state == FAILED ? 255 << 8 : status;
    if (k->done >= 0)
        close(k->done);
    k->done = -1;
    for (int i = 0; i < 3; i++)
        if (k->fds[i] >= 0) {
            close(k->fds[i]);
            k->fds[i] = -1;
        }
    if (k->state == MADE)
        k->error = 0; /* the program has run, but the helper has not checked yet */
    k->state = GONE;
    if (!signalled)
        CHECK(write(signals[1], &info, sizeof info) == sizeof info);
    signalled = true;
}

static struct child *child_of(pid_t pid)
{
    for (int i = 0; i < CHILDREN; i++)
        if (children[i].pid == pid && children[i].state != FREE && children[i].state != REAPED)
            return &children[i];
    return NULL;
}

int fuzz_kill(pid_t pid, int number)
{
    /* The helper may signal only its own processes that have not been waited for, and their groups. */
    struct child *k = child_of(pid < 0 ? -pid : pid);
    CHECK(pid != 0 && pid != -1 && k != NULL);
    if (number < 0 || number > 64) {
        errno = EINVAL;
        return -1;
    }
    if (number == SIGKILL || (number == SIGTERM && !k->stubborn))
        end_child(k, number);
    if (number == SIGKILL && pid < 0)
        k->group = false;
    return 0;
}

pid_t fuzz_wait4(pid_t pid, int *status, int options, struct rusage *usage)
{
    CHECK(pid == -1 && options == WNOHANG);
    signalled = false;
    for (int i = 0; i < CHILDREN; i++)
        if (children[i].state == GONE) {
            children[i].state = REAPED;
            *status = children[i].status;
            *usage = (struct rusage){.ru_maxrss = 1};
            return children[i].pid;
        }
    return 0;
}

long fuzz_syscall(long number, ...)
{
    va_list arguments;
    long result = -1;
    va_start(arguments, number);
    errno = ENOSYS;
    if (number == SYS_pidfd_open) {
        struct child *k = child_of(va_arg(arguments, pid_t));
        CHECK(k != NULL);
        result = k->pidfd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    } else if (number == SYS_pidfd_send_signal) {
        int fd = va_arg(arguments, int), sent = va_arg(arguments, int);
        for (int i = 0; i < CHILDREN; i++)
            if (children[i].pidfd == fd && children[i].state != FREE) {
                result = children[i].group ? 0 : -1;
                children[i].group = children[i].group && sent != SIGKILL;
            }
        errno = ESRCH;
    }
    va_end(arguments);
    return result;
}

/* -- the supervisor, which ends with its command and then knows its status -- */

static struct child *guard_of(const struct eb_supervisor *s)
{
    struct child *k = child_of(s->guard);
    CHECK(k != NULL && k->supervisor == s);
    return k;
}

static void end_supervised(struct eb_supervisor *s, int number)
{
    struct child *k = guard_of(s);
    if (s->gate == 0 && (number == SIGKILL || (number == SIGTERM && !k->stubborn))) {
        s->status = number;
        s->gate = 1;
        end_child(k, 0);
    }
}

bool eb_supervisor_knows_status(const struct eb_supervisor *s)
{
    return s->gate != 0;
}

void eb_supervisor_signal(struct eb_supervisor *s, bool group, int number)
{
    (void)group;
    end_supervised(s, number);
}

void eb_supervisor_signal_all(struct eb_supervisor *s, int number)
{
    if (number <= 0 || number > 64)
        return;
    end_supervised(s, number);
}

void eb_supervisor_free(struct eb_supervisor *s)
{
    CHECK(child_of(s->guard) == NULL); /* waited for */
    free(s);
}

/* -- the spawner -- */

static void begin(struct eb_start *start, const struct eb_request *q, bool apart)
{
    int done[2] = {-1, -1}, i = 0;
    (void)apart;
    *start = (struct eb_start){.done_fd = -1, .stage = EB_STAGE_START};
    while (i < CHILDREN && children[i].state != FREE && children[i].state != REAPED)
        i++;
    if (i == CHILDREN) {
        start->error = EAGAIN;
        return;
    }
    start->polled = eb_has(q, EB_TAG_COALESCE) && !(q->streams & 1) && !eb_has(q, EB_TAG_SUPERVISE);
    CHECK(start->polled || pipe2(done, O_CLOEXEC) == 0);
    struct child *k = &children[i];
    *k = (struct child){.state = MADE, .pid = ++last_pid, .done = done[1], .fds = {-1, -1, -1}, .pidfd = -1};
    if (eb_has(q, EB_TAG_SUPERVISE)) {
        CHECK((start->supervisor = k->supervisor = calloc(1, sizeof *k->supervisor)) != NULL);
        k->supervisor->guard = k->pid;
        k->supervisor->command = ++last_pid;
    }
    for (uint32_t t = 0; t < eb_request_sources(q); t++) {
        int copy = fcntl(q->sources[t], F_DUPFD_CLOEXEC, 3); /* all sources are open */
        CHECK(copy >= 0);
        if (t < q->target_count && q->targets[t] < 3 && q->targets[t] >= 0)
            k->fds[q->targets[t]] = copy;
        else
            close(copy);
    }
    for (int n = 0; n < 3; n++)
        if (k->fds[n] >= 0)
            CHECK(fcntl(k->fds[n], F_SETFL, O_NONBLOCK) == 0);
    start->pid = k->pid;
    start->owner = EB_OWNER_HELPER;
    start->done_fd = done[0];
    start->job = k;
}

static bool is_decided(const struct eb_start *start)
{
    const struct child *k = start->job;
    return k == NULL || k->state != MADE;
}

static void end(struct eb_start *start)
{
    struct child *k = start->job;
    if (start->done_fd >= 0)
        close(start->done_fd);
    start->done_fd = -1;
    start->polled = false;
    start->job = NULL;
    if (k == NULL)
        return;
    CHECK(k->state != MADE || k->done < 0);
    if (start->supervisor != NULL)
        start->pid = start->supervisor->command;
    start->error = k->error;
    start->stage = EB_STAGE_EXEC;
}

static void trim(unsigned kept)
{
    (void)kept;
}

static const struct eb_spawner spawner = {.begin = begin, .is_decided = is_decided, .end = end, .trim = trim};

/* -- what the helper sends -- */

static struct client *client_by(uint32_t id)
{
    CHECK(id >= 1 && id <= client_count);
    return &clients[id - 1];
}

static void on_told(struct client *c, uint8_t kind, struct eb_reader *r)
{
    CHECK(c == &server && !c->refused);
    if (kind == EB_REFUSED)
        c->refused = true;
    if (kind == EB_REFUSED || kind == EB_FULL || kind == EB_REPORT || (kind == EB_STAYS && !helper.pool))
        return;
    CHECK(kind == EB_WANT || kind == EB_DONE || kind == EB_CLOSED || kind == EB_ENDED);
    struct client *of = client_by(eb_get_u32(r));
    CHECK(!r->bad && !of->closed);
    CHECK(kind != EB_WANT || !of->wanting);
    CHECK(kind != EB_DONE || of->wanting);
    CHECK(kind != EB_CLOSED || !of->wanting);
    if (kind == EB_WANT || kind == EB_DONE)
        of->wanting = kind == EB_WANT;
    of->closed = kind == EB_CLOSED;
}

static void on_answer(struct client *c, uint8_t kind)
{
    CHECK(!c->refused);
    CHECK(c->greeted || kind == EB_HELLO);
    switch (kind) {
    case EB_HELLO:
        CHECK(!c->greeted);
        c->greeted = true;
        break;
    case EB_SPAWNED:
    case EB_FAILED:
        c->outcomes++;
        break;
    case EB_EXITED:
        c->ends++;
        break;
    case EB_REFUSED:
        c->refused = true;
        break;
    default:
        CHECK(kind == EB_STDOUT || kind == EB_STDERR || kind == EB_CREDIT || (kind == EB_UNREAD && !helper.pool));
    }
    CHECK(c->outcomes <= c->requests && c->ends <= c->requests);
}

static void parse(struct client *c)
{
    size_t at = 0;
    for (;;) {
        struct eb_reader r = eb_reader(c->in + at, c->in_size - at);
        uint32_t size = eb_get_u32(&r);
        uint8_t kind = eb_get_u8(&r);
        if (r.bad || eb_remaining(&r) < size)
            break;
        if (c == &server)
            on_told(c, kind, &r);
        else
            on_answer(c, kind);
        at += EB_HEADER_SIZE + size;
    }
    memmove(c->in, c->in + at, c->in_size - at);
    c->in_size -= at;
}

/* Takes what has come; false at the end of the connection. */
static bool listen_to(struct client *c)
{
    ssize_t n;
    while (c->fd >= 0 && c->in_size < BUFFER &&
           (n = recv(c->fd, c->in + c->in_size, BUFFER - c->in_size, MSG_DONTWAIT)) != 0) {
        if (n < 0)
            return errno == EAGAIN;
        c->in_size += (size_t)n;
        parse(c);
    }
    return false;
}

/* -- the script -- */

static void send_to(int fd, const void *data, size_t size, unsigned fd_count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(EB_MAX_FDS_PER_SEND * sizeof(int))];
    } control = {0};
    struct iovec bytes = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (fd < 0 || size == 0)
        return;
    if (fd_count > 0) {
        int fds[EB_MAX_FDS_PER_SEND];
        for (unsigned i = 0; i < fd_count; i++)
            fds[i] = helper.null_fd;
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        control.header = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(fd_count * sizeof(int))};
        memcpy(CMSG_DATA(&control.header), fds, fd_count * sizeof(int));
    }
    (void)!sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void send_frame(int fd, uint8_t kind, const uint8_t *payload, size_t size, unsigned fds, size_t most)
{
    static uint8_t frame[EB_HEADER_SIZE + EB_WINDOW + 256];
    struct eb_writer w = eb_writer(frame, sizeof frame);
    eb_put_u32(&w, (uint32_t)size);
    eb_put_u8(&w, kind);
    eb_put_bytes(&w, payload, size);
    send_to(fd, frame, eb_written(&w) < most ? eb_written(&w) : most, fds);
}

static void put_strings(struct eb_writer *w, uint8_t tag, const char *one)
{
    eb_put_u8(w, tag);
    eb_put_u32(w, 4 + (uint32_t)strlen(one) + 1);
    eb_put_u32(w, 1);
    eb_put_bytes(w, one, strlen(one) + 1);
}

static void put_empty(struct eb_writer *w, uint8_t tag)
{
    eb_put_u8(w, tag);
    eb_put_u32(w, 0);
}

static void ask(struct client *c)
{
    uint8_t payload[256];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    uint8_t what = next(), streams = next(), more = next(), count = more % 8, cut = next();
    put_strings(&w, EB_TAG_EXECUTABLES, "/x");
    put_strings(&w, EB_TAG_ARGV, "x");
    if (streams != 0) {
        eb_put_u8(&w, EB_TAG_STREAMS);
        eb_put_u32(&w, 1);
        eb_put_u8(&w, streams & 15);
    }
    if (streams & 16) {
        put_empty(&w, EB_TAG_SETSID);
        eb_put_u8(&w, EB_TAG_TERMINAL);
        eb_put_u32(&w, 17);
        for (int i = 0; i < 4; i++)
            eb_put_u32(&w, cut);
        eb_put_u8(&w, streams >> 5);
    }
    if (more & 8) {
        eb_put_u8(&w, EB_TAG_SUPERVISE);
        eb_put_u32(&w, 5);
        eb_put_u8(&w, more >> 4 & 1);
        eb_put_u32(&w, cut);
    }
    if (what & 1)
        put_empty(&w, EB_TAG_COALESCE);
    if (what & 2) {
        eb_put_u8(&w, EB_TAG_ON_CLOSE);
        eb_put_u32(&w, 4);
        eb_put_u32(&w, what & 4 ? 500 : EB_LIVES_ON);
    }
    if (what & 8)
        put_empty(&w, EB_TAG_CWD_FD);
    if (what & 128) {
        eb_put_u8(&w, EB_TAG_QUEUE);
        eb_put_u32(&w, 5);
        eb_put_u32(&w, cut & 1);
        eb_put_u8(&w, 1 + (cut >> 1 & 1));
    }
    if (count > 0) {
        eb_put_u8(&w, EB_TAG_FDS);
        eb_put_u32(&w, 4u * count);
        for (uint32_t i = 0; i < count; i++)
            eb_put_u32(&w, (what & 16 ? 0 : 3) + i);
    }
    c->requests++;
    unsigned fds = count + (what & 8 ? 1 : 0) + (what & 32 ? 1 : 0);
    send_frame(c->fd, EB_SPAWN, payload, eb_written(&w), fds, what & 64 ? cut : SIZE_MAX);
}

static void adopt(void)
{
    int pair[2];
    uint8_t payload[5], flags = next();
    struct eb_writer w = eb_writer(payload, sizeof payload);
    if (client_count == CLIENTS || server.fd < 0)
        return;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    struct client *c = &clients[client_count];
    c->fd = pair[0];
    c->id = ++client_count;
    eb_put_u32(&w, c->id);
    eb_put_u8(&w, flags & (EB_ASK | EB_TELL_ENDS));
    int kept = helper.null_fd;
    helper.null_fd = pair[1]; /* the descriptor that send_to passes */
    send_frame(server.fd, EB_ADOPT, payload, sizeof payload, 1, SIZE_MAX);
    helper.null_fd = kept;
    close(pair[1]);
    if (!(flags & 128))
        send_to(c->fd, "\0\4\0\0\0\1\1\0\0\0", 10, 0);
}

static void tell_server(uint8_t what)
{
    uint8_t payload[4] = {1 + next() % CLIENTS}, number = next();
    switch (what % 8) {
    case 0:
    case 1:
    case 2:
        send_frame(server.fd, EB_GRANT, payload, 4, 0, SIZE_MAX);
        break;
    case 3:
        send_frame(server.fd, EB_DRAIN, NULL, 0, 0, SIZE_MAX);
        break;
    case 4:
        send_frame(server.fd, EB_END, &number, 1, 0, SIZE_MAX);
        break;
    case 5:
    case 6:
        send_frame(server.fd, EB_QUERY, NULL, 0, 0, SIZE_MAX);
        break;
    default:
        send_frame(server.fd, number, payload, number % 5, number % 3, SIZE_MAX);
    }
}

static void act_as(struct child *k, uint8_t what)
{
    static uint8_t bytes[1 << 16];
    int number = 1 + (what >> 6 & 1);
    if (k->state < MADE || k->state > FAILED)
        return;
    switch (what % 8) {
    case 0: /* the exec fails */
        k->error = k->state == MADE ? ENOENT : k->error;
        /* fall through */
    case 1:
    case 2:
        if (k->state == MADE) {
            k->state = k->error != 0 ? FAILED : RUNS;
            if (k->done >= 0)
                close(k->done);
            k->done = -1;
        }
        break;
    case 3:
        end_child(k, what & 128 ? SIGSEGV : what << 8 & 0xff00);
        break;
    case 4:
        if (k->fds[number] >= 0)
            (void)!write(k->fds[number], bytes, (what & 128 ? 256 : 1) * (size_t)next());
        break;
    case 5:
        if (k->fds[0] >= 0)
            (void)!read(k->fds[0], bytes, sizeof bytes);
        break;
    case 6:
        if (k->fds[what >> 4 & 1] >= 0)
            close(k->fds[what >> 4 & 1]);
        k->fds[what >> 4 & 1] = -1;
        break;
    default:
        k->group = what & 16;
        k->stubborn = what & 32;
    }
}

static void act(void)
{
    static uint8_t input[EB_WINDOW];
    uint8_t op = next(), which = next();
    struct client *c = &clients[which % CLIENTS];
    uint8_t signal_payload[8] = {0};
    switch (op % 16) {
    case 0:
        adopt();
        break;
    case 1:
    case 2:
        ask(c);
        break;
    case 3: {
        size_t size = next() % 32u, left = (size_t)(script_end - script);
        size = size < left ? size : left;
        send_to(c->fd, script, size, which >> 6 == 3 ? 200 : which >> 6);
        script += size;
        break;
    }
    case 4: {
        uint32_t size = 257u * next();
        if (which & 64)
            send_frame(c->fd, EB_WINSIZE, input, 16, 0, SIZE_MAX);
        send_frame(c->fd, EB_STDIN, input, size, 0, which & 128 ? next() : SIZE_MAX);
        break;
    }
    case 5:
        signal_payload[4] = next();
        memcpy(signal_payload, &children[which / CLIENTS % CHILDREN].pid, next() & 1 ? 4 : 0);
        send_frame(c->fd, EB_SIGNAL, signal_payload, 8, 0, SIZE_MAX);
        break;
    case 6:
    case 7:
        (void)listen_to(c);
        break;
    case 8:
        if (c->fd >= 0 && which & 64) {
            (void)shutdown(c->fd, which & 128 ? SHUT_WR : SHUT_RDWR);
        } else if (c->fd >= 0) {
            close(c->fd);
            c->fd = -1;
        }
        break;
    case 9:
        tell_server(which);
        break;
    case 10:
        now_ns += 1000000ull * which * which;
        break;
    default:
        act_as(&children[which % CHILDREN], next());
    }
    (void)listen_to(&server);
}

/* -- the end -- */

static bool all_closed(void)
{
    for (unsigned i = 0; i < client_count; i++)
        if (!clients[i].closed)
            return false;
    return true;
}

/* Does what is left to do; returns whether there was anything. */
static bool finish(void)
{
    bool done = false;
    for (unsigned i = 0; i < client_count; i++)
        if (clients[i].fd >= 0) {
            (void)listen_to(&clients[i]);
            close(clients[i].fd);
            clients[i].fd = -1;
            done = true;
        }
    for (int i = 0; i < CHILDREN; i++)
        if (children[i].state >= MADE && children[i].state <= FAILED) {
            end_child(&children[i], 0);
            done = true;
        }
    if (!listen_to(&server) && server.fd >= 0) {
        close(server.fd);
        server.fd = -1;
        done = true;
    }
    if (!done && server.fd >= 0 && (all_closed() || !helper.pool)) {
        close(server.fd);
        server.fd = -1;
        done = true;
    }
    return done;
}

static int count_fds(void)
{
    int count = 0;
    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t *buffers;
    static int null_fd = -1;
    int control[2];
    if (buffers == NULL) {
        buffers = malloc((CLIENTS + 1) * BUFFER);
        null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
        CHECK(buffers != NULL && null_fd >= 0 && eb_counters_keep(-1));
        CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR); /* the helper blocks it */
    }
    int before = count_fds();
    script = data;
    script_end = data + size;
    for (int i = 0; i < CLIENTS; i++)
        clients[i] = (struct client){.fd = -1, .in = buffers + i * BUFFER};
    memset(children, 0, sizeof children);
    client_count = rounds = 0;
    signalled = false;
    now_ns = 1000000000;
    last_pid = FIRST_PID;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) == 0);
    CHECK(pipe2(signals, O_CLOEXEC | O_NONBLOCK) == 0);
    server = (struct client){.fd = control[0], .in = buffers + CLIENTS * BUFFER};
    helper = (struct eb_helper){
        .pool = size == 0 || (data[size - 1] & 1) == 0,            /* else it is a caller's own */
        .caller = {.pid = -1, .uid = (uid_t)-1, .gid = (gid_t)-1}, /* as without SO_PASSCRED */
        .owns_children = true,
        .frame_timeout_ms = 30000,
        .spawner = &spawner,
        .null_fd = null_fd,
    };
    CHECK(eb_connection_new(control[1], 0, 0, true) != NULL);
    send_to(server.fd, "\0\4\0\0\0\1\1\0\0\0", 10, 0);
    eb_serve(signals[0], -1);
    close(signals[1]);
    if (server.fd >= 0)
        close(server.fd);
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd >= 0)
            close(clients[i].fd);
    CHECK(helper.connections == NULL && helper.commands == NULL && helper.marked == NULL);
    for (int i = 0; i < CHILDREN; i++)
        CHECK(children[i].state == FREE || children[i].state == REAPED);
    CHECK(count_fds() == before);
    return 0;
}
