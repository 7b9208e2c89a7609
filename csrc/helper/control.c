/* What a daemon's server and its helper tell each other, and the figures that the server may ask for. */
#include "helper/service.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    MOST_FAILURES = 64, /* kinds of failure that are told apart */
    BUCKETS = 96,       /* of start times: up to 2^24 microseconds */
};

/* The server reads it by the same layout, see docs/protocol.md. */
struct figures {
    uint64_t started, ended;
    uint64_t failure_kinds;
    uint64_t buckets[BUCKETS];
    struct {
        uint32_t stage;
        int32_t error;
        uint64_t count;
    } failures[MOST_FAILURES];
};

static struct figures *figures; /* NULL in a private helper */
static uint64_t max_tasks;

static void send_control(enum eb_kind kind, const void *payload, size_t size)
{
    struct eb_connection *control = service.control;
    /* Not closed here, where some connection or other is at work: its end closes them all.  It comes as an
     * event of its own. */
    if (control != NULL && (!eb_connection_send(control, kind, payload, size) ||
                            (control->out_size > 0 && !eb_watch(control, EPOLLOUT))))
        (void)shutdown(control->fd, SHUT_RDWR);
}

void eb_tell(enum eb_kind kind, const struct eb_connection *c)
{
    uint8_t payload[4];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, c->id);
    if (service.pool)
        send_control(kind, payload, sizeof payload);
}

bool eb_tell_ids(void)
{
    uid_t uids[3];
    gid_t gids[3];
    int count = getgroups(0, NULL);
    if (count < 0 || getresuid(&uids[0], &uids[1], &uids[2]) != 0 || getresgid(&gids[0], &gids[1], &gids[2]) != 0)
        return false;
    gid_t *groups = calloc((size_t)count + 1, sizeof *groups);
    size_t size = (6 + (size_t)count) * 4;
    uint8_t *payload = malloc(size);
    bool told = groups != NULL && payload != NULL && getgroups(count, groups) == count;
    if (told) {
        struct eb_writer w = eb_writer(payload, size);
        for (int i = 0; i < 3; i++)
            eb_put_u32(&w, uids[i]);
        for (int i = 0; i < 3; i++)
            eb_put_u32(&w, gids[i]);
        for (int i = 0; i < count; i++)
            eb_put_u32(&w, groups[i]);
        send_control(EB_IDS, payload, size);
    }
    free(groups);
    free(payload);
    return told;
}

/* -- figures -- */

void eb_set_max_tasks(uint64_t count)
{
    max_tasks = count;
}

bool eb_keep_figures(int fd)
{
    const int flags = MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0);
    void *kept = mmap(NULL, sizeof *figures, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (kept == MAP_FAILED)
        return false;
    figures = kept;
    return true;
}

/* The least i for which it is less than 2^(i/4). */
static unsigned bucket(uint64_t microseconds)
{
    static const unsigned quarters[] = {11892, 14142, 16818}; /* 10^4 * 2^(1/4), and so on */
    uint64_t us = microseconds > 0 ? microseconds : 1;
    unsigned power = 63 - (unsigned)__builtin_clzll(us), i = 0;
    if (power >= BUCKETS / 4)
        return BUCKETS - 1;
    while (i < 3 && us * 10000 >= (uint64_t)quarters[i] << power)
        i++;
    i += 4 * power + 1;
    return i < BUCKETS ? i : BUCKETS - 1;
}

void eb_count_time(uint64_t microseconds)
{
    if (figures != NULL)
        figures->buckets[bucket(microseconds)]++;
}

void eb_count_start(void)
{
    if (figures != NULL && ++figures->started == max_tasks)
        send_control(EB_FULL, NULL, 0);
}

void eb_count_failure(enum eb_stage stage, int error)
{
    uint32_t i = 0;
    if (figures == NULL)
        return;
    while (i < figures->failure_kinds &&
           (figures->failures[i].stage != (uint32_t)stage || figures->failures[i].error != error))
        i++;
    if (i == MOST_FAILURES)
        i = MOST_FAILURES - 1; /* the rest together */
    if (i == figures->failure_kinds) {
        figures->failures[i].stage = (uint32_t)stage;
        figures->failures[i].error = error;
        figures->failure_kinds++;
    }
    figures->failures[i].count++;
}

void eb_count_end(void)
{
    if (figures != NULL)
        figures->ended++;
}

static void put_live(struct eb_writer *w, const struct eb_connection *c)
{
    eb_put_u32(w, (uint32_t)c->child);
    eb_put_u32(w, c->id);
    eb_put_u32(w, (uint32_t)c->client);
    eb_put_u32(w, c->client_uid);
    eb_put_u64(w, c->child_since);
    eb_put_u8(w, c->title_size);
    eb_put_u8(w, 0);
    eb_put_bytes(w, c->title, c->title_size);
}

void eb_on_query(struct eb_connection *control, const struct eb_frame *frame)
{
    if (figures == NULL) {
        eb_refuse(control, "QUERY is for a daemon's helper");
        return;
    }
    size_t size = 8 + 8 + 4 + 4 + (size_t)figures->failure_kinds * 13 + 4 + BUCKETS * 8 + 4;
    uint32_t live = 0;
    eb_connection_consume(control, EB_HEADER_SIZE + frame->size);
    for (const struct eb_connection *c = service.all; c != NULL; c = c->next)
        if (c->child != 0) {
            live++;
            size += 26 + c->title_size;
        }
    uint8_t *payload = malloc(size);
    if (payload == NULL) {
        eb_close_connection(control);
        return;
    }
    struct eb_writer w = eb_writer(payload, size);
    eb_put_u64(&w, figures->started);
    eb_put_u64(&w, figures->ended);
    eb_put_u32(&w, service.count);
    eb_put_u32(&w, (uint32_t)figures->failure_kinds);
    for (uint32_t i = 0; i < figures->failure_kinds; i++) {
        eb_put_u8(&w, (uint8_t)figures->failures[i].stage);
        eb_put_u32(&w, (uint32_t)figures->failures[i].error);
        eb_put_u64(&w, figures->failures[i].count);
    }
    eb_put_u32(&w, BUCKETS);
    for (uint32_t i = 0; i < BUCKETS; i++)
        eb_put_u64(&w, figures->buckets[i]);
    eb_put_u32(&w, live);
    for (const struct eb_connection *c = service.all; c != NULL; c = c->next)
        if (c->child != 0)
            put_live(&w, c);
    send_control(EB_REPORT, payload, eb_written(&w));
    free(payload);
}

/* -- what the server says -- */

void eb_on_adopt(struct eb_connection *control, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t id = 0;
    uint8_t flags = 0;
    if (frame->size > 0) {
        id = eb_get_u32(&r);
        flags = eb_get_u8(&r);
    }
    eb_connection_consume(control, EB_HEADER_SIZE + frame->size);
    if (r.bad || eb_remaining(&r) > 0) {
        eb_refuse(control, "ADOPT with a payload of %u bytes", (unsigned)frame->size);
        return;
    }
    if (control->fds.count == 0) {
        /* Out of descriptors: the other end of what was dropped reads end-of-file before any HELLO. */
        bool lost = control->fds.lost;
        eb_fds_clear(&control->fds);
        if (!lost) {
            eb_refuse(control, "ADOPT came without a descriptor");
            return;
        }
        const struct eb_connection gone = {.id = id};
        eb_tell(EB_CLOSED, &gone);
        return;
    }
    int fd = control->fds.at[0];
    control->fds.count--;
    memmove(control->fds.at, control->fds.at + 1, control->fds.count * sizeof *control->fds.at);
    if (service.draining) {
        /* It was on its way when we were told to stop; its client has not been served, and may go elsewhere. */
        const struct eb_connection gone = {.id = id};
        close(fd);
        eb_tell(EB_CLOSED, &gone);
        return;
    }
    (void)eb_adopt(fd, id, flags, false);
}

bool eb_close_if_at_rest(struct eb_connection *c)
{
    if (c->control || c->fd < 0 || !eb_at_rest(c) || c->in_size > 0 || c->out_size > 0)
        return false;
    /* A request may come between our last look and the close.  That the kernel tells its sender of unread bytes
     * is not enough where input followed the request: it may be the input alone that was not read. */
    if (!service.pool)
        (void)eb_connection_send(c, EB_UNREAD, NULL, 0);
    eb_close_connection(c);
    return true;
}

void eb_drain(void)
{
    struct eb_connection *c = service.all, *next;
    service.draining = true;
    /* A private helper's caller must not take one that ends for one that serves: its next ADOPT fails at once.
     * What it has sent is still read, and then the end. */
    if (!service.pool && service.control != NULL)
        (void)shutdown(service.control->fd, SHUT_RD);
    for (; c != NULL; c = next) {
        next = c->next;
        (void)eb_close_if_at_rest(c);
    }
}

void eb_on_drain(struct eb_connection *control, const struct eb_frame *frame)
{
    eb_connection_consume(control, EB_HEADER_SIZE + frame->size);
    eb_drain();
}

void eb_on_end(struct eb_connection *control, const struct eb_frame *frame)
{
    int number = frame->payload[0];
    eb_connection_consume(control, EB_HEADER_SIZE + frame->size);
    for (const struct eb_connection *c = service.all; c != NULL; c = c->next)
        if (c->child != 0) {
            eb_kill(c, number);
            eb_kill(c, SIGCONT);
        }
}

static void grant(struct eb_connection *c)
{
    c->wanting = false;
    c->granted = true;
    eb_proceed(c);
}

void eb_on_grant(struct eb_connection *control, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t id = eb_get_u32(&r);
    eb_connection_consume(control, EB_HEADER_SIZE + frame->size);
    struct eb_connection *c = service.all;
    while (c != NULL && (c->id != id || !c->wanting))
        c = c->next;
    if (c != NULL) /* else it has withdrawn meanwhile */
        grant(c);
}

void eb_server_gone(void)
{
    if (!service.pool)
        return;
    /* Nobody is left who could grant or limit anything: what was asked for already is done. */
    struct eb_connection *c = service.all, *next;
    for (; c != NULL; c = next) {
        next = c->next;
        if (c->wanting)
            grant(c);
    }
    eb_drain();
}
