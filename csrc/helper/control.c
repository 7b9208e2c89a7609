#include "helper/control.h"

#include "helper/command.h"
#include "helper/counters.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* -- reports -- */

static void send_control(enum eb_kind kind, const void *payload, size_t size)
{
    if (helper.control != NULL)
        eb_reply(helper.control, kind, payload, size);
}

void eb_tell(enum eb_kind kind, uint32_t id)
{
    if (helper.pool && helper.control != NULL)
        eb_reply_u32(helper.control, kind, id);
}

void eb_tell_end(const struct eb_command *k)
{
    const struct eb_record *record = k->record;
    uint8_t payload[4 * 4 + 1 + 5 * 8 + 2 * 4 + EB_MOST_CWD + EB_MOST_ARGV];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_put_u32(&w, k->connection_id);
    eb_put_u32(&w, (uint32_t)k->start.pid);
    eb_put_u32(&w, (uint32_t)k->end.status);
    eb_put_u32(&w, (uint32_t)k->start.error);
    eb_put_u8(&w, k->start.error != 0 ? k->start.stage : 0);
    eb_put_u64(&w, k->since_ms);
    eb_put_u64(&w, k->begun_ns != 0 ? (eb_clock_ns(CLOCK_MONOTONIC) - k->begun_ns) / 1000 : 0);
    for (int i = 0; i < 3; i++) /* user and system time, peak resident set */
        eb_put_u64(&w, k->end.usage[i]);
    eb_put_u32(&w, record->cwd_size);
    eb_put_bytes(&w, record->text, record->cwd_size);
    eb_put_u32(&w, record->argv_size);
    eb_put_bytes(&w, record->text + record->cwd_size, record->argv_size);
    send_control(EB_ENDED, payload, eb_written(&w));
}

void eb_tell_empty(enum eb_kind kind)
{
    send_control(kind, NULL, 0);
}

bool eb_tell_ids(void)
{
    int count = getgroups(0, NULL);
    uint32_t *ids = count < 0 ? NULL : malloc((6 + (size_t)count) * sizeof *ids);
    bool known = ids != NULL && getresuid(&ids[0], &ids[1], &ids[2]) == 0 &&
                 getresgid(&ids[3], &ids[4], &ids[5]) == 0 && getgroups(count, &ids[6]) == count;
    if (known) {
        struct eb_writer w = eb_writer(ids, (6 + (size_t)count) * sizeof *ids); /* encoded in place */
        for (int i = 0; i < 6 + count; i++)
            eb_put_u32(&w, ids[i]);
        send_control(EB_IDS, ids, eb_written(&w));
    }
    free(ids);
    return known;
}

static void put_live(struct eb_writer *w, const struct eb_command *k)
{
    eb_put_u32(w, (uint32_t)k->start.pid);
    eb_put_u32(w, k->connection_id);
    eb_put_u64(w, k->since_ms);
    eb_put_u8(w, k->cmdline_size);
    eb_put_u8(w, 0);
    eb_put_bytes(w, k->cmdline, k->cmdline_size);
}

void eb_on_query(struct eb_connection *control, const struct eb_frame *frame)
{
    if (!eb_counters_are_kept()) {
        eb_refuse(control, "QUERY is for a daemon's helper");
        return;
    }
    size_t size = eb_counters_size() + 4;
    uint32_t live = 0;
    eb_channel_consume(&control->channel, EB_HEADER_SIZE + frame->size);
    for (const struct eb_command *k = helper.commands; k != NULL; k = k->next)
        if (eb_command_lives(k)) {
            live++;
            size += 18 + k->cmdline_size;
        }
    uint8_t *payload = malloc(size);
    if (payload == NULL) {
        eb_mark_closing(control);
        return;
    }
    struct eb_writer w = eb_writer(payload, size);
    eb_counters_put(&w, helper.count);
    eb_put_u32(&w, live);
    for (const struct eb_command *k = helper.commands; k != NULL; k = k->next)
        if (eb_command_lives(k))
            put_live(&w, k);
    send_control(EB_REPORT, payload, eb_written(&w));
    free(payload);
}

/* -- frames of the server -- */

void eb_on_adopt(struct eb_connection *control, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    struct eb_fds *fds = &control->channel.fds;
    struct eb_connection *c = NULL;
    const uint32_t id = eb_get_u32(&r); /* 0 if the frame is empty */
    const uint8_t flags = eb_get_u8(&r);
    const bool lost = fds->count == 0 && fds->lost;
    eb_channel_consume(&control->channel, EB_HEADER_SIZE + frame->size);
    if (frame->size != 0 && frame->size != 5) {
        eb_refuse(control, "%s with a payload of %u bytes", "ADOPT", (unsigned)frame->size);
        return;
    }
    if (lost) {
        eb_fds_clear(fds); /* the peers of dropped descriptors read end-of-file before any HELLO */
    } else if (fds->count == 0) {
        eb_refuse(control, "ADOPT came without a descriptor");
        return;
    } else {
        int fd = eb_fds_take(fds);
        /* The connection may have been on its way when we were told to stop; its client has not been served, and may
         * go elsewhere. */
        if (helper.draining)
            close(fd);
        else
            c = eb_connection_new(fd, id, flags, false);
    }
    if (c == NULL)
        eb_tell(EB_CLOSED, id);
    else if (!eb_command_reserve(c))
        eb_mark_closing(c);
}

void eb_drain(void)
{
    helper.draining = true;
    /* A private helper's caller must not mistake a helper that ends for one that serves, so its next ADOPT fails at
     * once. What it has already sent is still read, up to the end. */
    if (!helper.pool && helper.control != NULL)
        (void)shutdown(helper.control->channel.fd, SHUT_RD);
    for (struct eb_connection *c = helper.connections; c != NULL; c = c->next)
        eb_mark(c);
}

void eb_on_drain(struct eb_connection *control, const struct eb_frame *frame)
{
    eb_channel_consume(&control->channel, EB_HEADER_SIZE + frame->size);
    eb_drain();
}

void eb_on_end(struct eb_connection *control, const struct eb_frame *frame)
{
    int number = frame->payload[0];
    eb_channel_consume(&control->channel, EB_HEADER_SIZE + frame->size);
    for (const struct eb_command *k = helper.commands; k != NULL; k = k->next)
        if (eb_command_lives(k)) {
            eb_command_kill(k, number);
            eb_command_kill(k, SIGCONT);
        }
}

static void grant(struct eb_command *k)
{
    k->state = EB_REQUESTED;
    eb_mark(k->connection);
}

void eb_on_grant(struct eb_connection *control, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t id = eb_get_u32(&r);
    eb_channel_consume(&control->channel, EB_HEADER_SIZE + frame->size);
    for (struct eb_command *k = helper.commands; k != NULL; k = k->next)
        if (k->state == EB_WAITING && k->asked && k->connection_id == id) {
            grant(k);
            return;
        }
    /* The request has been withdrawn meanwhile. */
}

void eb_server_gone(void)
{
    if (!helper.pool)
        return;
    /* No server is left that could grant or limit anything, so waiting requests are started. */
    for (struct eb_command *k = helper.commands; k != NULL; k = k->next)
        if (k->state == EB_WAITING)
            grant(k);
    eb_drain();
}
