#include "owner/process.h"

#include "spawn/supervisor.h"

#include <signal.h>

const char *eb_process_objection(const struct eb_request *q)
{
    if (eb_has(q, EB_TAG_TERMINAL) && ((q->streams & 3) != 3 || !eb_has(q, EB_TAG_SETSID)))
        return "option TERMINAL needs SETSID, and STREAMS with 0 and 1";
    if (eb_has(q, EB_TAG_LIMITS) && !q->tree_all)
        return "option LIMITS needs SUPERVISE with 1";
    return NULL;
}

void eb_process_signal(const struct eb_start *start, pid_t child, pid_t pid, int number)
{
    if (start->supervisor != NULL) {
        if (pid == EB_WHOLE_TREE)
            eb_supervisor_signal_all(start->supervisor, number);
        else if (pid == 0 || pid == start->pid || pid == -start->pid)
            eb_supervisor_signal(start->supervisor, pid < 0, number);
        return;
    }
    /* The child has not been waited for, so the pid is still its own.  A signal that crosses with EXITED comes too
     * late, as with kill(2). */
    if (pid == 0 || pid == child || pid == -child)
        (void)kill(pid != 0 ? pid : child, number);
}

void eb_process_kill(const struct eb_start *start, pid_t child, int number)
{
    if (start->supervisor != NULL)
        eb_supervisor_signal_all(start->supervisor, number);
    /* The child has not been waited for, so the pid is its own, and so is a group of that number. */
    else if (kill(-child, number) != 0)
        (void)kill(child, number);
}

struct eb_end eb_process_end(const struct eb_start *start, int status, const struct rusage *u)
{
    const struct eb_supervisor *s = start->supervisor;
    if (s != NULL && eb_supervisor_knows_status(s)) {
        u = &s->usage;
        status = s->status;
    } else if (s != NULL) {
        status = SIGKILL; /* the guard was killed by it, and the supervisor is about to kill the command */
    }
    return (struct eb_end){
        .status = status,
        .usage =
            {
                (uint64_t)u->ru_utime.tv_sec * 1000000 + (uint64_t)u->ru_utime.tv_usec,
                (uint64_t)u->ru_stime.tv_sec * 1000000 + (uint64_t)u->ru_stime.tv_usec,
                (uint64_t)u->ru_maxrss,
                (uint64_t)u->ru_minflt,
                (uint64_t)u->ru_majflt,
                (uint64_t)u->ru_inblock,
                (uint64_t)u->ru_oublock,
                (uint64_t)u->ru_nvcsw,
                (uint64_t)u->ru_nivcsw,
            },
    };
}

void eb_process_put_start(struct eb_writer *w, const struct eb_start *start)
{
    const bool failed = start->error != 0;
    eb_put_u32(w, failed && start->owner != EB_OWNER_CALLER ? 0 : (uint32_t)start->pid);
    if (failed)
        eb_put_u32(w, (uint32_t)start->error);
    eb_put_u8(w, failed ? start->stage : start->owner);
    if (failed)
        eb_put_u8(w, start->member);
}

void eb_process_put_end(struct eb_writer *w, const struct eb_end *end)
{
    eb_put_u32(w, (uint32_t)end->status);
    for (int i = 0; i < EB_USAGE_FIELDS; i++)
        eb_put_u64(w, end->usage[i]);
}

struct eb_tree_usage eb_process_tree(const struct eb_supervisor *s)
{
    const uint64_t peak = (uint64_t)s->tree.ru_maxrss << 10, seen = s->watch != NULL ? s->watch->peak_memory : 0;
    return (struct eb_tree_usage){
        .cause = s->cause,
        .user_us = eb_watch_us(&s->tree.ru_utime),
        .system_us = eb_watch_us(&s->tree.ru_stime),
        .peak = seen > peak ? seen : peak,
        .processes = s->watch != NULL ? s->watch->peak_processes : 0,
    };
}

void eb_process_put_tree(struct eb_writer *w, const struct eb_tree_usage *tree)
{
    eb_put_u8(w, (uint8_t)tree->cause);
    eb_put_u64(w, tree->user_us);
    eb_put_u64(w, tree->system_us);
    eb_put_u64(w, tree->peak);
    eb_put_u32(w, tree->processes);
}
