#include "helper/command.h"

#include "helper/counters.h"
#include "helper/queue.h"
#include "helper/rare.h"
#include "owner/stdio.h"
#include "helper/streams.h"
#include "spawn/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    CHILD_BUCKETS = 256,
    STREAMED_GRACE_MS = 1000,
    GROUP_TICK_MS = 40, /* poll interval for the end of a process group, which no descriptor reports */
};

static struct eb_command *children[CHILD_BUCKETS];

/* -- the table of children -- */

static struct eb_command **child_bucket(pid_t pid)
{
    return &children[(unsigned)pid % CHILD_BUCKETS];
}

static void add_child(struct eb_command *k, pid_t pid)
{
    struct eb_command **bucket = child_bucket(pid);
    k->child = pid;
    k->next_child = *bucket;
    *bucket = k;
}

static void forget_supervisor(struct eb_command *k)
{
    if (k->start.supervisor != NULL)
        eb_supervisor_free(k->start.supervisor);
    k->start.supervisor = NULL;
}

struct eb_command *eb_command_reap(pid_t pid, int status, const struct rusage *usage)
{
    for (struct eb_command **at = child_bucket(pid); *at != NULL; at = &(*at)->next_child)
        if ((*at)->child == pid) {
            struct eb_command *k = *at;
            *at = k->next_child;
            k->next_child = NULL;
            k->child = 0;
            k->end = eb_process_end(&k->start, status, usage);
            eb_tied_forget(k->tied_slot);
            k->tied_slot = 0;
            return k;
        }
    return NULL;
}

/* -- signals -- */

bool eb_command_lives(const struct eb_command *k)
{
    return k->child != 0 && k->state != EB_FAILING;
}

void eb_command_kill(const struct eb_command *k, int number)
{
    if (k->child > 0)
        eb_process_kill(&k->start, k->child, number);
}

void eb_on_signal(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    const struct eb_command *k = c->command;
    pid_t pid = (pid_t)eb_get_u32(&r), child = k != NULL ? k->child : 0;
    int given = (int)eb_get_u32(&r), number = given & ~EB_ENDS_GROUP;
    eb_channel_consume(&c->channel, EB_HEADER_SIZE + frame->size);
    if (child == 0)
        return;
    if (k->start.supervisor == NULL && pid == -child && (given & EB_ENDS_GROUP))
        c->command->ends_group = helper.ends_groups = true;
    eb_process_signal(&k->start, child, pid, number);
}

void eb_command_end_group(pid_t pid)
{
    for (const struct eb_command *k = *child_bucket(pid); k != NULL; k = k->next_child)
        if (k->child == pid && k->ends_group)
            (void)kill(-pid, SIGKILL);
}

/* Signals the group of a dying command whose leader has been waited for.  It does so by the pidfd, because another
 * group may have the number by now; before Linux 6.9 that is not possible, and the command ends with its leader. */
static bool signal_group(const struct eb_command *k, int number)
{
    const unsigned process_group = 1 << 2; /* PIDFD_SIGNAL_PROCESS_GROUP */
    return k->group_fd >= 0 && syscall(SYS_pidfd_send_signal, k->group_fd, number, NULL, process_group) == 0;
}

static bool is_gone(const struct eb_command *k)
{
    return k->child == 0 && !signal_group(k, 0);
}

static void forget_group(struct eb_command *k)
{
    if (k->group_fd >= 0)
        close(k->group_fd);
    k->group_fd = -1;
    k->dying = false;
}

static void end_command(struct eb_command *k)
{
    k->dying = true;
    if (k->start.supervisor == NULL)
        k->group_fd = (int)syscall(SYS_pidfd_open, k->child, 0);
    k->kill_at = eb_now_ms() + k->on_close_ms;
    eb_wake_by(eb_now_ms());
    eb_command_kill(k, SIGTERM);
    eb_command_kill(k, SIGCONT); /* a stopped process would not notice the signal */
}

void eb_command_wake(struct eb_command *k, uint64_t now)
{
    if (!k->dying || k->kill_at == 0)
        return;
    if (now < k->kill_at && !is_gone(k)) {
        eb_wake_by(now + GROUP_TICK_MS < k->kill_at ? now + GROUP_TICK_MS : k->kill_at);
        return;
    }
    k->kill_at = 0;
    if (k->child != 0) {
        eb_command_kill(k, SIGKILL);
    } else {
        (void)signal_group(k, SIGKILL);
        forget_group(k);
    }
}

/* -- from start to end -- */

/* Nothing reads the request any more; the part that the report needs takes its place. */
static void release_request(struct eb_command *k)
{
    struct eb_request q = k->request;
    struct eb_writer w = eb_writer(k->cmdline, sizeof k->cmdline);
    for (char **a = q.argv; a != NULL && *a != NULL && eb_written(&w) < sizeof k->cmdline; a++) {
        size_t length = strlen(*a) + 1, left = sizeof k->cmdline - eb_written(&w);
        eb_put_bytes(&w, *a, length < left ? length : left);
    }
    k->cmdline_size = (uint8_t)eb_written(&w);
    if (!k->start.still_read) {
        eb_request_free(&q);
        free(k->bytes);
    }
    k->bytes = NULL;
}

void eb_command_orphan(struct eb_command *k)
{
    struct eb_connection *c = k->connection;
    k->connection = NULL;
    c->command = NULL;
    if (k->state < EB_STARTING) {
        release_request(k);
        k->state = EB_OVER;
    } else if (k->state == EB_RUNNING && k->on_close) {
        end_command(k);
    }
}

static void report_start(const struct eb_command *k)
{
    uint8_t payload[16];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    bool failed = k->start.error != 0;
    if (k->connection == NULL || (k->connection->coalesces && !failed))
        return;
    eb_process_put_start(&w, &k->start);
    eb_reply(k->connection, failed ? EB_FAILED : EB_SPAWNED, payload, eb_written(&w));
}

static void report_end(const struct eb_command *k)
{
    uint8_t payload[EB_MOST_EXITED];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    eb_process_put_end(&w, &k->end);
    if (k->connection->coalesces) {
        eb_put_u64(&w, (eb_clock_ns(CLOCK_MONOTONIC) - k->begun_ns) / 1000);
        eb_put_u32(&w, (uint32_t)k->start.pid);
        eb_put_u8(&w, k->connection->place);
    }
    if (k->start.supervisor != NULL) {
        const struct eb_tree_usage tree = eb_process_tree(k->start.supervisor);
        eb_process_put_tree(&w, &tree);
    }
    eb_reply(k->connection, EB_EXITED, payload, eb_written(&w));
}

void eb_command_ended(struct eb_command *k)
{
    if (k->state == EB_FAILING) {
        report_start(k);
    } else if (k->state == EB_RUNNING) {
        eb_count_end();
        if (k->connection != NULL) {
            eb_streams_gather(k->connection);
            report_end(k);
        }
        if (k->dying && (k->kill_at == 0 || is_gone(k)))
            forget_group(k);
    }
    forget_supervisor(k);
    k->state = EB_OVER;
}

void eb_command_started(struct eb_command *k)
{
    static bool has_started;
    const bool polled = k->start.polled; /* its program may have been running for long */
    helper.spawner->end(&k->start);
    helper.starting--;
    release_request(k);
    if (k->start.error != 0) {
        eb_count_failure(k->start.stage, k->start.error);
        if (k->connection != NULL)
            eb_streams_abandon(k->connection);
        k->state = EB_FAILING;
        return;
    }
    uint64_t started = eb_count_start();
    helper.full = helper.full || (started != 0 && started == helper.max_tasks);
    eb_count_time(((polled ? k->start.exec_ns : eb_clock_ns(CLOCK_MONOTONIC)) - k->begun_ns) / 1000);
    k->state = k->start.owner == EB_OWNER_HELPER ? EB_RUNNING : EB_OVER;
    report_start(k);
    if (!has_started)
        eb_drop_rare_text(); /* by now all other code that a start needs is mapped */
    has_started = true;
    if (k->connection == NULL && k->child != 0 && k->on_close)
        end_command(k);
}

/* -- the request -- */

bool eb_command_reserve(struct eb_connection *c)
{
    c->spare = malloc(sizeof *c->spare);
    return c->spare != NULL;
}

static struct eb_command *use_spare(struct eb_connection *c)
{
    struct eb_command *k = c->spare;
    *k = (struct eb_command){
        .source = EB_SOURCE_START,
        .connection = c,
        .connection_id = c->id,
        .group_fd = -1,
        .start.done_fd = -1,
        .next = helper.commands,
    };
    if (k->next != NULL)
        k->next->previous = k;
    helper.commands = c->command = k;
    c->spare = NULL;
    return k;
}

/* Closes the descriptors that came with a request.  Later ones belong to the next frame, unless the order is lost. */
static void drop_fds(struct eb_command *k)
{
    struct eb_fds *fds = &k->connection->channel.fds;
    uint32_t count = eb_request_fds(&k->request);
    if (fds->lost || fds->count < count)
        eb_fds_clear(fds);
    else
        eb_fds_drop(fds, count);
}

/* The command can't be started; the loop sees that the outcome is known. */
static void fail(struct eb_command *k, int error, enum eb_stage stage)
{
    drop_fds(k);
    k->start.error = error;
    k->start.stage = stage;
    k->state = EB_STARTING;
    helper.starting++;
}

void eb_on_spawn(struct eb_connection *c, const struct eb_frame *frame)
{
    char reason[EB_MAX_REASON];
    const char *objection;
    struct eb_frame taken = *frame;
    struct eb_command *k = use_spare(c);
    struct eb_request *q = &k->request;
    k->bytes = eb_channel_take(&c->channel, &taken);
    if (k->bytes == NULL) {
        eb_refuse(c, "out of memory");
        return;
    }
    int error = eb_request_parse(q, taken.payload, taken.size, reason);
    if (error < 0)
        eb_refuse(c, "malformed SPAWN: %s", reason);
    else if (error > 0)
        fail(k, error, EB_STAGE_EXEC);
    else if (c->channel.fds.lost)
        fail(k, EMFILE, EB_STAGE_FDS);
    else if (c->channel.fds.count < eb_request_fds(q))
        eb_refuse(c, "malformed SPAWN: %u descriptors named, %u sent", (unsigned)eb_request_fds(q),
                  (unsigned)c->channel.fds.count);
    else if (!helper.owns_children && (q->streams != 0 || eb_has(q, EB_TAG_COALESCE) || eb_has(q, EB_TAG_SUPERVISE)))
        /* Such a helper could not report the end. */
        eb_refuse(c, "malformed SPAWN: option %s needs a helper that owns its children",
                  q->streams != 0              ? "STREAMS"
                  : eb_has(q, EB_TAG_COALESCE) ? "COALESCE"
                                               : "SUPERVISE");
    else if (helper.pool && eb_has(q, EB_TAG_QUEUE))
        eb_refuse(c, "malformed SPAWN: option QUEUE is not for a daemon's clients, which would share their queues");
    else if ((objection = eb_process_objection(q)) != NULL)
        eb_refuse(c, "malformed SPAWN: %s", objection);
    else if (eb_has(q, EB_TAG_QUEUE))
        eb_queue_join(c);
    else if (c->tells_ends && (k->record = eb_record_new(q, &c->channel.fds)) == NULL)
        fail(k, ENOMEM, EB_STAGE_START); /* no command runs without a report */
}

void eb_command_begin(struct eb_command *k)
{
    struct eb_connection *c = k->connection;
    struct eb_request *q = &k->request;
    int ends[3] = {-1, -1, -1};
    if (q->streams != 0 && !eb_streams_make(c, q, ends)) {
        fail(k, errno, EB_STAGE_FDS);
        eb_stdio_close(ends);
        return;
    }
    if (q->nulls != 0 && helper.null_fd < 0 && (helper.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0) {
        int error = errno;
        if (q->streams != 0)
            eb_streams_abandon(c);
        eb_stdio_close(ends);
        fail(k, error, EB_STAGE_FDS);
        return;
    }
    eb_stdio_place(q, &c->channel.fds, ends, helper.null_fd);
    q->present |= (uint64_t)1 << EB_TAG_SIGMASK | (uint64_t)1 << EB_TAG_SIGIGN; /* not inherited from us */
    if (helper.pool)
        eb_self_complete(&helper.self, q);
    c->coalesces = eb_has(q, EB_TAG_COALESCE);
    bool given = eb_has(q, EB_TAG_ON_CLOSE), supervised = eb_has(q, EB_TAG_SUPERVISE);
    k->on_close = given ? q->on_close_ms != EB_LIVES_ON : q->streams != 0 || supervised;
    k->on_close_ms = given ? q->on_close_ms : q->streams != 0 ? STREAMED_GRACE_MS : 0;
    k->begun_ns = eb_clock_ns(CLOCK_MONOTONIC);
    k->state = EB_STARTING;
    /* A daemon's clients may send any descriptors, and may never complete their request. */
    helper.spawner->begin(&k->start, q, helper.pool && eb_fds_held() > eb_request_fds(q));
    if (++helper.starting > 1)
        helper.needs_trim = true;
    /* The new process has its own copies by now. */
    drop_fds(k);
    eb_stdio_close(ends);
    if (k->start.pid > 0 && k->start.owner == EB_OWNER_HELPER) {
        add_child(k, k->start.pid);
        if (helper.pool)
            k->since_ms = eb_clock_ns(CLOCK_REALTIME) / 1000000;
        if (k->on_close && !supervised) /* a guard notices by itself that we have been killed */
            k->tied_slot = eb_tied_keep(k->start.pid, k->on_close_ms);
    }
}
