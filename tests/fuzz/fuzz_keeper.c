/*
 * Fuzzes a job's keeper: its loop, what its clients send, its rings and their readers.  Its sockets, pipes, files and
 * epoll set are real; the clock and the command are simulated.  An input is a script: each time the loop waits, the
 * harness takes the next step, until there are no more; then the command ends and all clients leave, and the loop must
 * end.
 *
 *     tests/fuzz/run 600      # ten minutes together with the others, with libFuzzer
 *
 * For a follower that has asked once for all of the output, the pieces and what MISSED reports must add up to what the
 * command has written.
 */
#include "fuzz_keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "../c/check.h"
#include "owner/stdio.h"
#include "keeper/client.h"
#include "keeper/journal.h"
#include "keeper/loop.h"
#include "spawn/supervisor.h"

/* In this file, these are the real functions. */
#undef epoll_wait
#undef clock_gettime

#include "script.h"

enum { CLIENTS = 6, BUFFER = 1 << 18, PID = 1000, LONGEST_WRITE = 4 << 10, NULL_FD = 7 };

struct client {
    int fd;              /* -1: not connected yet, or gone */
    bool follows_on;     /* to the end */
    bool ended, follows; /* EXITED or REFUSED has come; the client's output is checked */
    bool odd;            /* it has sent other frames */
    uint64_t known[EB_RINGS];
    uint8_t *in;
    size_t in_size;
};

struct eb_keeper keeper;

static struct client clients[CLIENTS];
static uint64_t written[EB_RINGS];
static int server, signals[2], command[3];
static bool lives, reaped;

static uint8_t nth_byte(int stream, uint64_t n)
{
    return (uint8_t)(n * 7 + n / 251 + (uint64_t)stream);
}

/* -- the kernel that the keeper sees -- */

static void end_command(void)
{
    if (!lives)
        return;
    lives = false;
    for (int i = 0; i < 3; i++)
        close(command[i]);
    CHECK(write(signals[1], "", 1) == 1);
}

int fuzz_kill(pid_t pid, int number)
{
    CHECK((pid == PID || pid == -PID) && !reaped);
    if (number == SIGKILL)
        end_command();
    return 0;
}

int fuzz_waitid(idtype_t type, id_t id, siginfo_t *info, int options)
{
    (void)type, (void)id, (void)options;
    info->si_pid = lives || reaped ? 0 : PID;
    errno = ECHILD;
    return reaped ? -1 : 0;
}

pid_t fuzz_wait4(pid_t pid, int *status, int options, struct rusage *usage)
{
    (void)options;
    CHECK(pid == PID && !lives && !reaped);
    reaped = true;
    *status = 0;
    *usage = (struct rusage){.ru_maxrss = 1};
    return PID;
}

long fuzz_syscall(long number, ...)
{
    (void)number;
    return -1;
}

/* -- the spawner -- */

static void begin(struct eb_start *start, const struct eb_request *q, bool apart)
{
    (void)apart;
    *start = (struct eb_start){.done_fd = -1, .pid = PID, .owner = EB_OWNER_HELPER};
    for (int i = 0; i < 3; i++) {
        CHECK(q->targets[i] == i);
        CHECK((command[i] = fcntl(q->sources[i], F_DUPFD_CLOEXEC, 10)) >= 0);
        CHECK(fcntl(command[i], F_SETFL, O_NONBLOCK) == 0);
    }
    lives = true;
}

static bool is_decided(const struct eb_start *start)
{
    (void)start;
    return true;
}

static void end(struct eb_start *start)
{
    (void)start;
}

static void trim(unsigned kept)
{
    (void)kept;
}

static const struct eb_spawner spawner = {.begin = begin, .is_decided = is_decided, .end = end, .trim = trim};

/* -- the supervisor: there is none -- */

bool eb_supervisor_knows_status(const struct eb_supervisor *s)
{
    return s == NULL;
}

void eb_supervisor_signal(struct eb_supervisor *s, bool group, int number)
{
    (void)group, (void)number;
    CHECK(s == NULL);
}

void eb_supervisor_signal_all(struct eb_supervisor *s, int number)
{
    (void)number;
    CHECK(s == NULL);
}

void eb_supervisor_note(struct eb_supervisor *s, pid_t pid, int status, const struct rusage *usage)
{
    (void)pid, (void)status, (void)usage;
    CHECK(s == NULL);
}

bool eb_supervisor_kill_rest(struct eb_supervisor *s, bool again)
{
    (void)again;
    CHECK(s == NULL);
    return false;
}

void eb_supervisor_free(struct eb_supervisor *s)
{
    CHECK(s == NULL);
}

/* -- clients -- */

static void send_bytes(int fd, const void *data, size_t size)
{
    if (fd >= 0)
        (void)!send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void send_frame(int fd, enum eb_kind kind, const uint8_t *payload, uint32_t size)
{
    static uint8_t frame[EB_HEADER_SIZE + (64 << 10)];
    struct eb_writer w = eb_writer(frame, sizeof frame);
    eb_put_u32(&w, size);
    eb_put_u8(&w, kind);
    eb_put_bytes(&w, payload, size);
    send_bytes(fd, frame, eb_written(&w));
}

static void connect_client(struct client *c)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    /* A small buffer, so that a follower soon misses something. */
    CHECK(setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &(int){1}, sizeof(int)) == 0);
    *c = (struct client){.fd = pair[0], .in = c->in};
    uint8_t adopt[EB_HEADER_SIZE] = {0, 0, 0, 0, EB_ADOPT};
    struct iovec bytes = {adopt, sizeof adopt};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.header), &pair[1], sizeof(int));
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    (void)!sendmsg(server, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    close(pair[1]);
    send_bytes(c->fd, "\0\4\0\0\0\1\1\0\0\0", 10);
}

static void check_output(struct client *c, int stream, const uint8_t *data, uint64_t size)
{
    CHECK(stream == 1 || stream == 2);
    uint64_t *known = &c->known[stream - 1];
    for (uint64_t i = 0; data != NULL && i < size; i++)
        CHECK(!c->follows || c->odd || data[i] == nth_byte(stream, *known + i));
    *known += size;
}

static void take_frame(struct client *c, enum eb_kind kind, const uint8_t *payload, uint32_t size)
{
    struct eb_reader r = eb_reader(payload, size);
    CHECK(!c->ended);
    switch (kind) {
    case EB_HELLO:
    case EB_SPAWNED:
    case EB_CAUGHT_UP:
    case EB_CREDIT:
        break;
    case EB_PIECE: {
        (void)eb_get_u64(&r);
        (void)eb_get_u64(&r);
        int stream = eb_get_u8(&r);
        size_t left = eb_remaining(&r);
        check_output(c, stream, eb_get_bytes(&r, left), left);
        break;
    }
    case EB_MISSED: {
        int stream = eb_get_u8(&r);
        uint64_t missed = eb_get_u64(&r);
        CHECK(missed > 0 || c->odd);
        check_output(c, stream, NULL, missed);
        break;
    }
    case EB_EXITED:
        for (int i = 0; i < EB_RINGS; i++)
            CHECK(!c->follows_on || c->odd || c->known[i] == written[i]);
        c->ended = true;
        break;
    default:
        CHECK(kind == EB_REFUSED);
        c->ended = true;
    }
    CHECK(!r.bad);
}

/* Reads once; returns whether anything came. */
static bool listen_to(struct client *c)
{
    if (c->fd < 0)
        return false;
    ssize_t n = recv(c->fd, c->in + c->in_size, BUFFER - c->in_size, MSG_DONTWAIT);
    if (n <= 0)
        return false;
    c->in_size += (size_t)n;
    size_t at = 0;
    for (;;) {
        struct eb_reader r = eb_reader(c->in + at, c->in_size - at);
        uint32_t size = eb_get_u32(&r);
        uint8_t kind = eb_get_u8(&r);
        const uint8_t *payload = r.bad ? NULL : eb_get_bytes(&r, size);
        if (payload == NULL)
            break;
        take_frame(c, kind, payload, size);
        at += EB_HEADER_SIZE + size;
    }
    c->in_size -= at;
    memmove(c->in, c->in + at, c->in_size);
    return true;
}

/* -- a step of the script -- */

static void write_output(int stream, size_t size)
{
    uint8_t data[LONGEST_WRITE];
    for (size_t i = 0; i < size; i++)
        data[i] = nth_byte(stream, written[stream - 1] + i);
    ssize_t n = lives ? write(command[stream], data, size) : 0;
    written[stream - 1] += n > 0 ? (uint64_t)n : 0;
}

static void send_something(struct client *c, uint8_t which)
{
    static const uint8_t kinds[] = {EB_FOLLOW, EB_ATTACH, EB_WINSIZE, EB_STDIN,
                                    EB_SIGNAL, EB_SPAWN,  EB_NOTIFY,  EB_ADOPT};
    static const uint8_t sizes[] = {25, 17, 16, 0, 8, 0, 3, 0};
    static const uint8_t zeros[64 << 10];
    uint8_t payload[32];
    const unsigned i = which % sizeof kinds;
    for (size_t n = 0; n < sizeof payload; n++)
        payload[n] = n < sizes[i] ? next() : 0;
    c->odd = c->odd || kinds[i] == EB_FOLLOW;
    if (kinds[i] == EB_STDIN)
        send_frame(c->fd, EB_STDIN, zeros, 257u * next());
    else
        send_frame(c->fd, kinds[i], payload, sizes[i]);
}

static void act(void)
{
    static const uint8_t all[25];
    static const uint8_t on[25] = {[24] = EB_FOLLOW_ON};
    const uint8_t what = next(), which = next();
    struct client *c = &clients[which % CLIENTS];
    switch (what % 10) {
    case 0:
        if (c->fd < 0)
            connect_client(c);
        break;
    case 1:
        if (c->fd < 0)
            connect_client(c);
        if (!c->follows && !c->odd) {
            send_frame(c->fd, EB_FOLLOW, which & 64 ? all : on, sizeof all);
            c->follows_on = !(which & 64);
        }
        c->follows = true;
        break;
    case 2: {
        size_t size = next() % 32u, left = (size_t)(script_end - script);
        size = size < left ? size : left;
        send_bytes(c->fd, script, size);
        c->odd = true;
        script += size;
        break;
    }
    case 3:
        send_something(c, which / CLIENTS);
        break;
    case 4:
    case 5:
        write_output(1 + (which & 1), 1 + which % 8 * (size_t)next() * 2);
        break;
    case 6:
        (void)listen_to(c);
        break;
    case 7: {
        uint8_t input[512];
        if (lives)
            (void)!read(command[0], input, sizeof input);
        break;
    }
    case 8:
        if (c->fd >= 0 && which & 64) {
            (void)shutdown(c->fd, which & 128 ? SHUT_WR : SHUT_RDWR);
            c->odd = true;
        } else if (c->fd >= 0) {
            close(c->fd);
            c->fd = -1;
        }
        break;
    default:
        now_ns += 1000000ull * which * which;
    }
}

/* Does what is left to do; returns whether there was anything. */
static bool finish(void)
{
    bool done = lives;
    end_command();
    for (int i = 0; i < CLIENTS; i++)
        done = listen_to(&clients[i]) || done;
    for (int i = 0; i < CLIENTS && !done; i++)
        if (clients[i].fd >= 0) {
            close(clients[i].fd);
            clients[i].fd = -1;
            done = true;
        }
    return done;
}

static void spawn(void)
{
    static const uint8_t options[] = {
        EB_TAG_EXECUTABLES, 7, 0, 0, 0, 1, 0, 0, 0, '/', 'a', 0, EB_TAG_ARGV, 4, 0, 0, 0, 0, 0, 0, 0,
        EB_TAG_STREAMS,     1, 0, 0, 0, 7};
    send_frame(clients[0].fd, EB_SPAWN, options, sizeof options);
}

/* Moves a descriptor above the numbers that have a meaning. */
static int move_up(int fd)
{
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, 10);
    CHECK(moved >= 0);
    close(fd);
    return moved;
}

static void replace(int fd, int number)
{
    CHECK(fd >= 0 && dup2(fd, number) == number);
    close(fd);
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
    int control[2];
    if (buffers == NULL) {
        CHECK((buffers = malloc(CLIENTS * BUFFER)) != NULL);
        replace(move_up(memfd_create("ring", 0)), EB_RING_FD);
        replace(move_up(open("/dev/null", O_WRONLY)), EB_JOURNAL_FD);
        replace(move_up(open("/dev/null", O_RDWR)), NULL_FD);
        CHECK(signal(SIGPIPE, SIG_IGN) != SIG_ERR); /* the keeper blocks it */
        eb_journal_use(EB_JOURNAL_FD);
    }
    int before = count_fds();
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) == 0);
    server = move_up(control[0]);
    CHECK(pipe2(signals, O_CLOEXEC | O_NONBLOCK) == 0);
    for (int i = 0; i < 2; i++)
        signals[i] = move_up(signals[i]);
    control[1] = move_up(control[1]);
    int listener = move_up(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(bind(listener, &(struct sockaddr){.sa_family = AF_UNIX}, sizeof(sa_family_t)) == 0);
    CHECK(listen(listener, 1) == 0);
    replace(listener, EB_LISTENER_FD);
    for (int i = 0; i < CLIENTS; i++)
        clients[i] = (struct client){.fd = -1, .in = buffers + i * BUFFER};
    memset(written, 0, sizeof written);
    now_ns = 1000000000;
    rounds = 0;
    lives = reaped = false;
    script = data;
    script_end = data + size;
    CHECK(ftruncate(EB_RING_FD, 0) == 0);
    keeper = (struct eb_keeper){
        .ring_size = 4 << 10,
        .frame_timeout_ms = 30000,
        .linger_ms = 30000,
        .null_fd = NULL_FD,
        .fds = {-1, -1, -1},
        .start.done_fd = -1,
        .spawner = &spawner,
    };
    CHECK(eb_client_new(control[1], EB_CLIENT_SERVER) != NULL);
    send_bytes(server, "\0\4\0\0\0\1\1\0\0\0", 10);
    connect_client(&clients[0]);
    clients[0].odd = true;
    spawn();
    eb_keeper_serve(signals[0]);
    end_command();
    close(signals[1]);
    close(server);
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd >= 0)
            close(clients[i].fd);
    while (keeper.clients != NULL)
        eb_client_free(keeper.clients);
    close(EB_LISTENER_FD);
    eb_stdio_close(keeper.fds);
    close(signals[0]);
    CHECK(count_fds() == before);
    return 0;
}
