/* A command's process: its signals, its end, and the frames about its start and end. */
#ifndef EB_PROCESS_H
#define EB_PROCESS_H

#include "spawn/spawn.h"

#include <sys/resource.h>

enum {
    EB_USAGE_FIELDS = 9, /* of EXITED */
    EB_MOST_EXITED = 4 + (EB_USAGE_FIELDS + 1) * 8 + 4 + 1 + 1 + 3 * 8 + 4,
};

struct eb_end {
    int status;
    uint64_t usage[EB_USAGE_FIELDS];
};

/* What a supervisor has seen of a command's tree: times in microseconds, memory in bytes. */
struct eb_tree_usage {
    enum eb_cause cause;
    uint64_t user_us, system_us, peak;
    uint32_t processes;
};

/* The reason why a process that owns its children can't start a request, or NULL if it can. */
const char *eb_process_objection(const struct eb_request *q);

/* Sends the signal of a SIGNAL, `pid` and `number`, to a command whose process `child` has not been waited for.
 * A signal for another process is dropped. */
void eb_process_signal(const struct eb_start *start, pid_t child, pid_t pid, int number);
/* Signals the command's whole tree, or its process group, or only the command if it leads none. */
void eb_process_kill(const struct eb_start *start, pid_t child, int number);

/* Returns the end of a process that has been waited for with this result, which is a guard's if the command is
 * supervised. */
struct eb_end eb_process_end(const struct eb_start *start, int status, const struct rusage *usage);

/* The payload of SPAWNED, or of FAILED if there is an error. */
void eb_process_put_start(struct eb_writer *w, const struct eb_start *start);
/* The beginning of the payload of EXITED. */
void eb_process_put_end(struct eb_writer *w, const struct eb_end *end);
/* What EXITED says about a supervised command's tree. */
struct eb_tree_usage eb_process_tree(const struct eb_supervisor *s);
void eb_process_put_tree(struct eb_writer *w, const struct eb_tree_usage *tree);

#endif
