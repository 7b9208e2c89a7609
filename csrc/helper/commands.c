/* From a request to the end of the process that it asked for. */
#include "helper/service.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    CHILD_BUCKETS = 256,
    STREAMED_GRACE_MS = 1000,
};

static struct eb_connection *children[CHILD_BUCKETS];

static uint64_t nanoseconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

bool eb_at_rest(const struct eb_connection *c)
{
    return !c->starting && !c->wanting && c->child == 0 && c->streams == NULL;
}

/* -- the table of live children -- */

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

/* -- the end -- */

/* Signals the group of a dying command whose leader has been waited for.  By its pidfd, since another group
 * may have the number by now; before Linux 6.9 there is no such call, and the leader's end is the end. */
static bool signal_group(const struct eb_connection *c, int number)
{
    const unsigned process_group = 1 << 2; /* PIDFD_SIGNAL_PROCESS_GROUP */
    return c->group_fd >= 0 && syscall(SYS_pidfd_send_signal, c->group_fd, number, NULL, process_group) == 0;
}

bool eb_command_gone(const struct eb_connection *c)
{
    return c->child == 0 && !signal_group(c, 0);
}

static void forget_group(struct eb_connection *c)
{
    if (c->group_fd >= 0)
        close(c->group_fd);
    c->group_fd = -1;
    c->dying = false;
}

void eb_kill_command(struct eb_connection *c)
{
    if (c->child != 0) {
        eb_kill(c, SIGKILL);
    } else {
        (void)signal_group(c, SIGKILL);
        forget_group(c);
        eb_release(c);
    }
}

/* The command is over, or was none. */
static void settle(struct eb_connection *c)
{
    if (c->granted)
        eb_tell(EB_DONE, c);
    c->granted = c->on_close = false;
    c->title_size = 0;
    if (c->dying && (c->deadline == 0 || eb_command_gone(c)))
        forget_group(c);
    if (c->fd < 0)
        eb_release(c);
}

void eb_kill(const struct eb_connection *c, int number)
{
    /* Not yet waited for, so the pid is its own, and a group of that number can only be its. */
    if (c->child > 0 && kill(-c->child, number) != 0)
        (void)kill(c->child, number);
}

static void end_command(struct eb_connection *c)
{
    c->dying = true;
    c->group_fd = (int)syscall(SYS_pidfd_open, c->child, 0);
    c->deadline = eb_now_ms() + c->on_close_ms;
    eb_look_by(eb_now_ms());
    eb_kill(c, SIGTERM);
    eb_kill(c, SIGCONT); /* stopped, it would not notice */
}

void eb_abandon_command(struct eb_connection *c)
{
    c->deadline = 0;
    if (c->wanting)
        eb_tell(EB_DONE, c);
    c->wanting = false;
    if (c->child != 0 && c->on_close && !c->starting)
        end_command(c);
}

static void report_end(struct eb_connection *c, int status, const struct rusage *used)
{
    uint8_t payload[4 + 10 * 8 + 4];
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
    if (c->brief) {
        eb_put_u64(&w, (nanoseconds(CLOCK_MONOTONIC) - c->begun_ns) / 1000);
        eb_put_u32(&w, (uint32_t)c->start.pid);
    }
    eb_reply(c, EB_EXITED, payload, eb_written(&w));
}

void eb_reap(void)
{
    struct rusage used;
    int status;
    pid_t pid;
    while ((pid = wait4(-1, &status, WNOHANG, &used)) > 0) {
        struct eb_connection *c = remove_child(pid);
        if (c == NULL)
            continue;
        /* It may have come and gone before its start was noticed; the outcome is known by now. */
        bool told = !c->starting;
        if (!told)
            eb_finish_start(c);
        if (told || c->start.error == 0) {
            eb_count_end();
            eb_streams_gather(c);
            report_end(c, status, &used);
            settle(c);
        }
        eb_proceed(c);
    }
}

/* -- the start -- */

static struct eb_connection *quiet_starts; /* whose start is under way, and tells nobody when it is over */

static void remove_quiet(struct eb_connection *c)
{
    struct eb_connection **at = &quiet_starts;
    while (*at != NULL && *at != c)
        at = &(*at)->next_quiet;
    if (*at != NULL)
        *at = c->next_quiet;
}

void eb_notice_starts(void)
{
    struct eb_connection *c = quiet_starts, *next;
    quiet_starts = NULL;
    for (; c != NULL; c = next) {
        next = c->next_quiet;
        if (service.spawner->runs(&c->start)) {
            eb_finish_start(c);
            eb_proceed(c);
        } else {
            c->next_quiet = quiet_starts;
            quiet_starts = c;
        }
    }
}

static void report_start(struct eb_connection *c)
{
    uint8_t payload[16];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    if (c->start.error == 0) {
        eb_put_u32(&w, (uint32_t)c->start.pid);
        eb_put_u8(&w, c->start.owner);
        eb_reply(c, EB_SPAWNED, payload, eb_written(&w));
    } else {
        eb_put_u32(&w, c->start.owner == EB_OWNER_CALLER ? (uint32_t)c->start.pid : 0);
        eb_put_u32(&w, (uint32_t)c->start.error);
        eb_put_u8(&w, c->start.stage);
        eb_reply(c, EB_FAILED, payload, eb_written(&w));
    }
}

static void keep_title(struct eb_connection *c)
{
    struct eb_writer w = eb_writer(c->title, sizeof c->title);
    for (char **a = c->request.argv; *a != NULL && eb_written(&w) < sizeof c->title; a++) {
        size_t length = strlen(*a) + 1, left = sizeof c->title - eb_written(&w);
        eb_put_bytes(&w, *a, length < left ? length : left);
    }
    c->title_size = (uint8_t)eb_written(&w);
}

void eb_finish_start(struct eb_connection *c)
{
    struct eb_frame frame;
    /* Closing is not enough: other new processes hold copies of it until they exec, and with them it would
     * go on to report events, for a start that is over. */
    if (c->start.done_fd >= 0)
        eb_unwatch_fd(c->start.done_fd);
    bool quiet = c->start.quiet;
    if (quiet)
        remove_quiet(c);
    service.spawner->end(&c->start);
    service.starting--;
    c->starting = false;
    if (c->start.error != 0 && c->child != 0) {
        /* Its descriptors are closed already, so it is ending and this wait is short.  No EXITED: its
         * client is told why it failed. */
        (void)waitpid(c->child, NULL, 0);
        (void)remove_child(c->child);
    }
    if (c->start.error == 0) {
        eb_count_start();
        if (!quiet) /* else the program may have run for long */
            eb_count_time((nanoseconds(CLOCK_MONOTONIC) - c->begun_ns) / 1000);
        if (service.pool)
            keep_title(c);
    } else {
        eb_count_failure(c->start.stage, c->start.error);
        eb_streams_close(c);
    }
    eb_request_free(&c->request);
    if (c->fd < 0) {
        eb_connection_close(c);
        eb_streams_close(c);
        if (c->child != 0 && c->on_close)
            end_command(c);
    } else {
        if (eb_connection_frame(c, &frame) == 1)
            eb_connection_consume(c, EB_HEADER_SIZE + frame.size);
        if (c->start.error != 0 || !c->brief)
            report_start(c);
    }
    if (c->start.error != 0 || c->start.owner == EB_OWNER_CALLER)
        settle(c);
}

static void fail_start(struct eb_connection *c, const struct eb_frame *frame, int error, enum eb_stage stage)
{
    c->start = (struct eb_start){.done_fd = -1, .error = error, .stage = stage};
    eb_count_failure(stage, error);
    /* Those behind them belong to the next frame, unless the order is lost. */
    if (c->fds.lost || c->fds.count < eb_request_fds(&c->request))
        eb_fds_clear(&c->fds);
    else
        eb_fds_drop(&c->fds, eb_request_fds(&c->request));
    eb_request_free(&c->request);
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
    report_start(c);
    settle(c);
}

/* Where the request has no limit of this resource. */
static void default_limit(struct eb_request *q, int resource, rlim_t soft)
{
    for (uint32_t i = 0; i < q->rlimit_count; i++)
        if (q->rlimits[i].resource == resource)
            return;
    if (q->rlimit_count == EB_MAX_RLIMITS)
        return;
    struct eb_rlimit *own = &q->rlimits[q->rlimit_count++];
    own->resource = resource;
    own->limit = service.self.rlimits[resource];
    own->limit.rlim_cur = soft < own->limit.rlim_max ? soft : own->limit.rlim_max;
}

/* Completes what a request leaves open, where this process's own state is none to inherit: its signals, its
 * limit of files, that of processes, which is as the last request had it (see adopt_nproc), and, for another
 * user, the environment.  And what it may not exceed, its commands get as far as it may; else no start would
 * succeed where a daemon's limits are lower than its client's. */
static void complete(const struct eb_connection *c, struct eb_request *q)
{
    static char *empty[] = {NULL};
    q->present |= 1u << EB_TAG_SIGMASK | 1u << EB_TAG_SIGIGN;
    if (!service.pool)
        return;
    bool unchanged = c->peer == NULL || c->peer->uid == 0;
    for (uint32_t i = 0; i < q->rlimit_count; i++) {
        struct rlimit *limit = &q->rlimits[i].limit;
        rlim_t most = service.self.rlimits[q->rlimits[i].resource].rlim_max;
        if (!(service.raises_limits && unchanged) && limit->rlim_max > most)
            limit->rlim_max = most;
        if (!(service.raises_limits && unchanged) && limit->rlim_cur > limit->rlim_max)
            limit->rlim_cur = limit->rlim_max;
    }
    if (!(service.raises_priority && unchanged) && q->nice < service.self.nice)
        q->nice = service.self.nice;
    default_limit(q, RLIMIT_NOFILE, service.open_files);
    default_limit(q, RLIMIT_NPROC, service.self.rlimits[RLIMIT_NPROC].rlim_cur);
    if (c->peer != NULL && q->env == NULL)
        q->env = empty;
}

static int made_source(const struct eb_request *q, int target, const int ends[3])
{
    if (q->nulls >> target & 1)
        return service.null_fd;
    return target == 2 && (q->streams & EB_JOINED) ? ends[1] : ends[target];
}

/* Gives each target its source: what was sent, or the end of a pipe. */
static void place_sources(struct eb_connection *c, const int ends[3])
{
    struct eb_request *q = &c->request;
    uint32_t next = 0;
    for (uint32_t i = 0; i < eb_request_sources(q); i++)
        if (i < q->target_count && eb_is_made(q, q->targets[i]))
            q->sources[i] = made_source(q, q->targets[i], ends);
        else
            q->sources[i] = c->fds.at[next++];
}

static void close_ends(int ends[3])
{
    for (int i = 0; i < 3; i++)
        if (ends[i] >= 0)
            close(ends[i]);
}

void eb_on_spawn(struct eb_connection *c, const struct eb_frame *frame)
{
    char reason[EB_MAX_REASON];
    int ends[3] = {-1, -1, -1};
    struct eb_request *q = &c->request;
    if (c->child == 0 && !eb_at_rest(c)) {
        eb_refuse(c, "SPAWN before the end of the last command's output");
        return;
    }
    if (!eb_at_rest(c)) {
        eb_refuse(c, "SPAWN while this connection's command %d is running", (int)c->child);
        return;
    }
    int error = eb_request_parse(q, frame->payload, frame->size, reason);
    if (error < 0) {
        eb_refuse(c, "malformed SPAWN: %s", reason);
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
    if (c->fds.count < eb_request_fds(q)) {
        eb_refuse(c, "malformed SPAWN: %u descriptors named, %u sent", (unsigned)eb_request_fds(q),
                  (unsigned)c->fds.count);
        return;
    }
    if (c->ask && !c->granted && service.control != NULL) {
        eb_request_free(q); /* read again when its turn has come */
        c->wanting = true;
        if (!eb_watch(c, 0))
            eb_close_connection(c);
        else
            eb_tell(EB_WANT, c);
        return;
    }
    /* Nobody would be told of a brief one's end. */
    if (!service.owns_children && (q->streams != 0 || eb_has(q, EB_TAG_BRIEF))) {
        eb_refuse(c, "malformed SPAWN: option %s needs a helper that owns its children",
                  q->streams != 0 ? "STREAMS" : "BRIEF");
        return;
    }
    if (q->streams != 0 && !eb_streams_make(c, ends)) {
        fail_start(c, frame, errno, EB_STAGE_FDS);
        return;
    }
    place_sources(c, ends);
    complete(c, q);
    q->peer = c->peer;
    c->brief = eb_has(q, EB_TAG_BRIEF);
    bool given = eb_has(q, EB_TAG_ON_CLOSE);
    c->on_close = given ? q->on_close_ms != EB_LIVES_ON : q->streams != 0;
    c->on_close_ms = given ? q->on_close_ms : STREAMED_GRACE_MS;
    c->begun_ns = nanoseconds(CLOCK_MONOTONIC);
    service.spawner->begin(&c->start, q);
    if (++service.starting > 1)
        service.untidy = true;
    c->starting = true;
    /* The new process has its own by now. */
    eb_fds_drop(&c->fds, eb_request_fds(q));
    close_ends(ends);
    if (c->start.pid > 0 && c->start.owner == EB_OWNER_HELPER) {
        add_child(c, c->start.pid);
        if (service.pool)
            c->child_since = nanoseconds(CLOCK_REALTIME) / 1000000;
    }
    if (c->start.quiet) {
        c->next_quiet = quiet_starts;
        quiet_starts = c;
        eb_look_by(eb_now_ms());
    } else if (c->start.done_fd < 0) {
        eb_finish_start(c);
    } else if (!eb_watch_fd(c->start.done_fd, 0, &c->start_source)) {
        /* Out of memory or watches: wait for this one here rather than lose it. */
        char byte;
        (void)!read(c->start.done_fd, &byte, 1);
        eb_finish_start(c);
    }
}

void eb_on_signal(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    pid_t pid = (pid_t)eb_get_u32(&r);
    int number = (int)eb_get_u32(&r);
    eb_connection_consume(c, EB_HEADER_SIZE + frame->size);
    /* Not yet waited for, so the pid is still its own.  A signal may cross with EXITED: then it is late,
     * as it would be with kill(2). */
    if (c->child != 0 && (pid == 0 || pid == c->child || pid == -c->child))
        (void)kill(pid != 0 ? pid : c->child, number);
}
