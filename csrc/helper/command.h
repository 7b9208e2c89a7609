/*
 * A command, from the request to the end of its process.
 *
 *   state      what it waits for            what its connection does meanwhile   if the connection ends
 *   REQUESTED  the loop: begin it, or ask   nothing                              it is dropped
 *   WAITING    GRANT, or its queue          watches for a hang-up                it is dropped
 *   STARTING   the exec, or its failure     nothing                              then as if it were RUNNING
 *   FAILING    the end of its process       nothing                              nothing
 *   RUNNING    the end of its process       takes SIGNAL and STDIN               it lives on, or is ended (ON_CLOSE)
 *   OVER       the loop: release it; if it  -                                    -
 *              is dying, that of its group
 *
 * A connection without a command is at rest when its streams are over too; it then takes the next SPAWN.
 */
#ifndef EB_COMMAND_H
#define EB_COMMAND_H

#include "helper/connection.h"
#include "owner/process.h"
#include "helper/record.h"

#include <sys/resource.h>

enum eb_command_state {
    EB_REQUESTED,
    EB_WAITING,
    EB_STARTING,
    EB_FAILING,
    EB_RUNNING,
    EB_OVER,
};

enum { EB_MOST_CMDLINE = 200 };

struct eb_command {
    enum eb_source source; /* EB_SOURCE_START */
    enum eb_command_state state;
    struct eb_connection *connection; /* NULL: the connection has ended */
    uint32_t connection_id;
    bool asked;      /* the server has got WANT, and must get DONE */
    bool on_close;   /* the end of the connection ends it: SIGTERM, and SIGKILL after a time */
    bool dying;      /* that end has begun */
    bool ends_group; /* what it leaves of its process group gets SIGKILL */
    uint32_t on_close_ms;
    uint32_t tied_slot; /* where the server finds the command, see counters.h */
    uint64_t kill_at;   /* of eb_now_ms: when to send SIGKILL; 0: it has been sent */
    int group_fd;       /* the pidfd for signals to the group of a dying command whose leader has gone */
    struct eb_start start;
    /* Read by the start, up to its outcome: */
    uint8_t *bytes;           /* the memory of the frame */
    pid_t child;              /* ours, and not yet waited for; 0: none */
    struct eb_end end;        /* of its process, when it has been waited for */
    uint64_t begun_ns;        /* of CLOCK_MONOTONIC */
    uint64_t since_ms;        /* since 1970 */
    struct eb_record *record; /* for the report of the end; allocated, freed by the loop; NULL: there is no report */
    uint8_t cmdline_size;
    union {
        struct eb_request request;        /* up to the outcome of the start; its strings are in `bytes` */
        uint8_t cmdline[EB_MOST_CMDLINE]; /* afterwards: the beginning of its argv, for the report */
    };
    struct eb_command *next, *previous; /* in the list of all; or `next` in the list of the dead */
    struct eb_command *next_child;      /* in its bucket of the child table, or in the list of those that have ended */
    struct eb_command *next_polled;     /* the loop's */
};

/* Gives a new connection the memory for a command; false if there is none. */
bool eb_command_reserve(struct eb_connection *c);
/* Makes a command of a request, or refuses it. */
void eb_on_spawn(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_signal(struct eb_connection *c, const struct eb_frame *frame);
/* Makes the process; then the command is STARTING, see `start`. */
void eb_command_begin(struct eb_command *k);
/* Called when the outcome of the start is known.  Then the command is RUNNING, OVER if its process is the caller's,
 * or FAILING. */
void eb_command_started(struct eb_command *k);
/* Called when the process `pid` has been waited for.  Returns its command, or NULL. */
struct eb_command *eb_command_reap(pid_t pid, int status, const struct rusage *usage);
/* Called when the process, if there was one, has been waited for, and the outcome of the start is known: tells the
 * client. */
void eb_command_ended(struct eb_command *k);
/* Called when the client has gone; does to the command what the request says. */
void eb_command_orphan(struct eb_command *k);

/* Whether the command has a process that runs, or is about to run. */
bool eb_command_lives(const struct eb_command *k);
/* Signals the command's process group, or only the command if it leads none. */
void eb_command_kill(const struct eb_command *k, int number);
/* Kills what is left of the process group of a child that has ended, if that was asked for.  Call it before waiting
 * for the child, so that the number still belongs to the group. */
void eb_command_end_group(pid_t pid);

/* Kills a dying command when its time has come. */
void eb_command_wake(struct eb_command *k, uint64_t now);

#endif
