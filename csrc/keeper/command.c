#include "keeper/command.h"

#include "owner/stdio.h"
#include "keeper/attach.h"
#include "keeper/follow.h"
#include "keeper/journal.h"
#include "keeper/log.h"
#include "keeper/notify.h"
#include "spawn/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    READS_PER_TURN = 8,
    LAST_READ = 1 << 20, /* bytes of each stream, when the command has ended: no pipe holds more */
    HUNG_MS = 100,       /* poll interval for events that no descriptor reports: a terminal is opened again */
    BUSY_READS = 16,     /* full reads in a row, after which a larger pipe pays off */
    BUSY_PIPE = 256 << 10,
    KILL_MS = 20, /* between attempts to end a tree that has lost its supervisor */
};

/* Read by the start, up to its outcome. */
static uint8_t *bytes;
static struct eb_request request;
static struct run {
    bool ends_group;        /* what is left of the command's process group gets SIGKILL */
    unsigned full_reads[3]; /* in a row */
    bool enlarged[3];       /* whether the pipe is enlarged */
    uint64_t begun_ms;      /* of eb_now_ms */
    bool has_ended;         /* whether `child` has been waited for, with this result: */
    int status;
    struct rusage usage;
    uint64_t kill_at; /* of eb_now_ms: when a tree without a supervisor is killed again; 0: it has not been killed */
} run;

/* -- the start -- */

static void release_request(void)
{
    if (!keeper.start.still_read) {
        eb_request_free(&request);
        free(bytes);
    }
    bytes = NULL;
}

static struct eb_client *starter(void)
{
    struct eb_client *c = keeper.clients;
    while (c != NULL && c->kind != EB_CLIENT_STARTER)
        c = c->next;
    return c;
}

static void be_over(void)
{
    keeper.state = EB_KEEPER_OVER;
    keeper.over_ms = eb_now_ms();
    keeper.over = 7;
}

/* The time of a process's start in ticks since the boot, which tells it from others that get its number.  0: it is not
 * known. */
static unsigned long long begun_at(pid_t pid)
{
    char text[512] = "";
    (void)snprintf(text, sizeof text, "/proc/%d/stat", (int)pid);
    int fd = open(text, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    text[size > 0 ? size : 0] = '\0';
    const char *at = strrchr(text, ')'); /* the end of the second field, a name */
    for (int field = 2; field < 22 && at != NULL; field++) {
        at = strchr(at, ' ');
        at += at != NULL;
    }
    return at != NULL ? strtoull(at, NULL, 10) : 0;
}

void eb_kept_started(void)
{
    uint8_t payload[16];
    struct eb_writer w = eb_writer(payload, sizeof payload);
    struct eb_client *c = starter();
    struct eb_start *start = &keeper.start;
    keeper.spawner->end(start);
    release_request();
    if (start->error == 0 && !eb_journal_add("{\"pid\": %d, \"keeper\": %d, \"begun\": %llu}", (int)start->pid,
                                             (int)getpid(), begun_at(start->pid))) {
        start->error = errno; /* a job that is not in its journal would be taken for one that has not been started */
        start->stage = EB_STAGE_RING;
        eb_process_kill(start, keeper.child, SIGKILL);
    }
    eb_process_put_start(&w, start);
    if (start->error != 0) {
        (void)eb_journal_add("{\"failed\": [%d, %d, %d]}", start->error, (int)start->stage, (int)start->member);
        be_over();
    } else {
        keeper.state = EB_KEEPER_RUNNING;
    }
    if (c != NULL)
        eb_client_send(c, start->error != 0 ? EB_FAILED : EB_SPAWNED, payload, eb_written(&w));
    if (c != NULL && c->broken && start->error == 0) /* its client can't be told, and takes the start for failed */
        eb_process_kill(start, keeper.child, SIGKILL);
}

static void fail(struct eb_client *c, int error, enum eb_stage stage)
{
    eb_fds_clear(&c->channel.fds);
    keeper.start.error = error;
    keeper.start.stage = stage;
    eb_kept_started();
}

/* The streams with a ring. */
static unsigned ringed(const struct eb_request *q)
{
    return q->streams & 6u;
}

static void begin(struct eb_client *c)
{
    int ends[3] = {-1, -1, -1};
    run = (struct run){.begun_ms = eb_now_ms()};
    if (eb_has(&request, EB_TAG_UMASK))
        umask(request.umask); /* for the log too */
    if (!eb_log_open()) {
        fail(c, errno, EB_STAGE_LOG);
        return;
    }
    if (!eb_journal_reserve() || !eb_ring_make(EB_RING_FD, keeper.ring_size, ringed(&request))) {
        fail(c, errno, EB_STAGE_RING);
        return;
    }
    if (!eb_stdio_open(&request, keeper.fds, ends)) {
        int error = errno;
        eb_stdio_close(ends);
        fail(c, error, EB_STAGE_FDS);
        return;
    }
    keeper.terminal = eb_has(&request, EB_TAG_TERMINAL);
    eb_attach_begin(&request.size);
    eb_stdio_place(&request, &c->channel.fds, ends, keeper.null_fd);
    request.present |= (uint64_t)1 << EB_TAG_SIGMASK | (uint64_t)1 << EB_TAG_SIGIGN; /* not inherited from us */
    eb_self_complete(&keeper.self, &request);
    if (eb_has(&request, EB_TAG_SUPERVISE))
        (void)prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); /* if it fails, so does the guard's */
    keeper.spawner->begin(&keeper.start, &request, false);
    eb_stdio_close(ends);
    eb_fds_clear(&c->channel.fds);
    if (keeper.start.pid > 0)
        keeper.child = keeper.start.pid;
    if (keeper.start.done_fd < 0)
        eb_kept_started();
}

void eb_kept_spawn(struct eb_client *c, const struct eb_frame *frame)
{
    char reason[EB_MAX_REASON];
    const char *objection;
    struct eb_frame taken = *frame;
    const struct eb_fds *fds = &c->channel.fds;
    bytes = eb_channel_take(&c->channel, &taken);
    if (bytes == NULL) {
        eb_client_refuse(c, "out of memory");
        return;
    }
    int error = eb_request_parse(&request, taken.payload, taken.size, reason);
    keeper.state = EB_KEEPER_STARTING;
    if (error < 0)
        eb_client_refuse(c, "malformed SPAWN: %s", reason);
    else if (error > 0)
        fail(c, error, EB_STAGE_EXEC);
    else if (fds->lost)
        fail(c, EMFILE, EB_STAGE_FDS);
    else if (fds->count != eb_request_fds(&request))
        eb_client_refuse(c, "malformed SPAWN: %u descriptors named, %u sent", (unsigned)eb_request_fds(&request),
                         (unsigned)fds->count);
    else if (eb_has(&request, EB_TAG_COALESCE) || eb_has(&request, EB_TAG_ON_CLOSE) || eb_has(&request, EB_TAG_QUEUE))
        eb_client_refuse(c, "malformed SPAWN: options COALESCE, ON_CLOSE and QUEUE are not allowed for a job");
    else if ((objection = eb_process_objection(&request)) != NULL)
        eb_client_refuse(c, "malformed SPAWN: %s", objection);
    else
        begin(c);
    if (c->broken)
        be_over(); /* the request has been refused */
}

/* -- signals -- */

void eb_kept_signal(struct eb_client *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    const pid_t pid = (pid_t)eb_get_u32(&r);
    const int given = (int)eb_get_u32(&r);
    (void)c;
    if (keeper.child == 0 || keeper.state != EB_KEEPER_RUNNING)
        return;
    if (keeper.start.supervisor == NULL && pid == -keeper.child && (given & EB_ENDS_GROUP))
        run.ends_group = true;
    eb_process_signal(&keeper.start, keeper.child, pid, given & ~EB_ENDS_GROUP);
}

/* -- its output -- */

/* Returns the number of bytes read; 0: nothing is there now, or this is the end. */
static size_t read_some(int number)
{
    const size_t most = eb_ring_most();
    uint8_t *buffer = eb_ring_buffer();
    if (buffer == NULL) { /* memory is short */
        keeper.hung_until = eb_now_ms() + HUNG_MS;
        return 0;
    }
    ssize_t n = read(keeper.fds[number], buffer, most);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n < 0) { /* a terminal may be opened again */
        keeper.hung_until = eb_now_ms() + HUNG_MS;
        return 0;
    }
    if (n == 0) {
        eb_keeper_close(number);
        return 0;
    }
    eb_ring_add(number, (size_t)n);
    int error = eb_log_add(buffer, (size_t)n);
    if (error != 0) {
        (void)eb_journal_add("{\"log_errno\": %d}", error);
        keeper.log_error = error;
    }
    run.full_reads[number] = (size_t)n == most ? run.full_reads[number] + 1 : 0;
    return (size_t)n;
}

void eb_kept_read(int number)
{
    for (int i = 0; i < READS_PER_TURN && eb_keeper_has(number) && read_some(number) > 0; i++)
        eb_follow_all();
    /* Not from the beginning, because a user has a limited number of pages for all pipes, and beyond that gets only
     * small pipes. */
    if (run.full_reads[number] >= BUSY_READS && !run.enlarged[number] && eb_keeper_has(number)) {
        run.enlarged[number] = true;
        (void)fcntl(keeper.fds[number], F_SETPIPE_SZ, BUSY_PIPE);
    }
}

void eb_kept_wake(uint64_t now)
{
    if (run.has_ended && keeper.state == EB_KEEPER_RUNNING) {
        eb_kept_reap();
        eb_keeper_wake_by(keeper.state == EB_KEEPER_RUNNING ? run.kill_at : now);
    }
    if (keeper.hung_until != 0 && now >= keeper.hung_until)
        keeper.hung_until = 0;
    else if (keeper.hung_until != 0)
        eb_keeper_wake_by(keeper.hung_until);
}

/* -- its end -- */

static const char *cause_of(enum eb_cause cause, int status)
{
    static const char *const limits[] = {
        [EB_CAUSE_TIMEOUT] = "timeout",
        [EB_CAUSE_CPU] = "cpu",
        [EB_CAUSE_MEMORY] = "memory",
        [EB_CAUSE_PROCESSES] = "processes",
    };
    return cause != EB_CAUSE_NONE ? limits[cause] : WIFSIGNALED(status) ? "signal" : "exit";
}

static void note(const struct eb_end *end, const struct eb_tree_usage *tree)
{
    const uint64_t now_us = eb_clock_ns(CLOCK_REALTIME) / 1000, ms = eb_now_ms() - run.begun_ms, *u = end->usage;
    char more[192] = "";
    int size = 0;
    if (keeper.start.supervisor != NULL)
        size = snprintf(more, sizeof more, ", \"tree\": [%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu32 "]",
                        tree->user_us, tree->system_us, tree->peak, tree->processes);
    if (eb_log_lost() != NULL)
        (void)snprintf(more + size, sizeof more - (size_t)size, ", \"log_lost\": %" PRIu64, *eb_log_lost());
    (void)eb_journal_add("{\"ended\": %" PRIu64 ".%06" PRIu64 ", \"duration\": %" PRIu64 ".%03" PRIu64
                         ", \"status\": %d, \"cause\": %d, \"usage\": [%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64
                         ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 "], \"bytes\": [%" PRIu64
                         ", %" PRIu64 "], \"lost\": [%" PRIu64 ", %" PRIu64 "]%s}",
                         now_us / 1000000, now_us % 1000000, ms / 1000, ms % 1000, end->status, (int)tree->cause, u[0],
                         u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], eb_ring_added(1), eb_ring_added(2),
                         eb_ring_lost(1), eb_ring_lost(2), more);
}

static void finish(int status, const struct rusage *usage)
{
    struct eb_writer w = eb_writer(keeper.exited, sizeof keeper.exited);
    for (int number = 1; number < 3; number++)
        for (size_t left = LAST_READ, n; left > 0 && eb_keeper_has(number) && (n = read_some(number)) > 0;) {
            left -= n < left ? n : left;
            eb_follow_all();
        }
    const struct eb_end end = eb_process_end(&keeper.start, status, usage);
    struct eb_tree_usage tree = {.cause = EB_CAUSE_NONE};
    eb_process_put_end(&w, &end);
    if (keeper.start.supervisor != NULL) {
        tree = eb_process_tree(keeper.start.supervisor);
        eb_process_put_tree(&w, &tree);
    }
    keeper.exited_size = eb_written(&w);
    note(&end, &tree);
    eb_notify_begin(WIFSIGNALED(end.status) ? 128 + WTERMSIG(end.status) : WEXITSTATUS(end.status),
                    cause_of(tree.cause, end.status));
    if (keeper.start.supervisor != NULL)
        eb_supervisor_free(keeper.start.supervisor);
    keeper.start.supervisor = NULL;
    eb_attach_end_input();
    be_over();
}

/* A guard ends after its tree.  If it has been killed, the tree is killed here. */
static void finish_unless_any(bool any)
{
    struct eb_supervisor *s = keeper.start.supervisor;
    if (any && s != NULL) {
        if (eb_now_ms() < run.kill_at)
            return;
        const bool killed = eb_supervisor_kill_rest(s, run.kill_at != 0);
        run.kill_at = eb_now_ms() + KILL_MS;
        if (killed)
            return;
    }
    if (run.kill_at != 0)
        (void)getrusage(RUSAGE_CHILDREN, &s->tree);
    finish(run.status, &run.usage);
}

void eb_kept_reap(void)
{
    siginfo_t info = {.si_pid = 0};
    struct rusage usage;
    int status, r;
    while ((r = waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT)) == 0 && info.si_pid != 0) {
        const pid_t pid = info.si_pid;
        if (pid == keeper.child && run.ends_group)
            (void)kill(-pid, SIGKILL);
        /* The process may have come and gone before its start was noticed; the outcome is known by now.  Until it has
         * been waited for, the pid that this may signal is its own. */
        if (pid == keeper.child && keeper.state == EB_KEEPER_STARTING)
            eb_kept_started();
        if (wait4(pid, &status, WNOHANG, &usage) != pid)
            return;
        info.si_pid = 0;
        if (keeper.start.supervisor != NULL)
            eb_supervisor_note(keeper.start.supervisor, pid, status, &usage);
        if (pid != keeper.child)
            continue;
        keeper.child = 0;
        run.has_ended = true;
        run.status = status;
        run.usage = usage;
    }
    if (run.has_ended && keeper.state == EB_KEEPER_RUNNING)
        finish_unless_any(r == 0);
}
