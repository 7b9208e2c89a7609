/* What the parts of the helper share: its connections, and what each part does with them. */
#ifndef EB_SERVICE_H
#define EB_SERVICE_H

#include "helper/connection.h"

struct eb_service {
    struct eb_state self; /* this process, as it was started but for its raised limit of open files */
    rlim_t open_files;    /* that limit as it was */
    bool raises_limits, raises_priority; /* may exceed its own */
    bool pool;            /* one of a daemon's helpers, not a caller's own */
    bool draining;        /* takes no command any more */
    struct ucred caller;  /* of a private helper: whom it serves */
    uint64_t due;         /* of eb_now_ms: when some connection needs a look, at the latest; 0: never */
    bool untidy;          /* several connections have been at work at once */
    unsigned starting;    /* starts under way */
    const struct eb_spawner *spawner;
    struct eb_connection *control; /* NULL: at its end */
    struct eb_connection *all;     /* those that are open, and those whose command lives on */
    struct eb_connection *dead;    /* freed between two rounds of events, which may point to them */
    int null_fd;                   /* /dev/null */
    bool owns_children;
    unsigned count;                /* of `all`, without the control socket */
};

extern struct eb_service service;

uint64_t eb_now_ms(void);
/* Has the connections looked at then, or a few milliseconds later. */
void eb_look_by(uint64_t when);

/* -- helper.c: the connections, and the epoll set -- */

bool eb_adopt(int fd, uint32_t id, uint8_t flags, bool control);
/* Watches for `events`, 0 for a hang-up only. */
bool eb_watch(struct eb_connection *c, uint32_t events);
bool eb_watch_fd(int fd, uint32_t events, enum eb_source *source);
void eb_unwatch_fd(int fd);
/* Acts on the frames that have come whole, as far as the connection's state lets it. */
void eb_proceed(struct eb_connection *c);
/* Sends a frame, or holds it back for a moment if the command's are to go together. */
void eb_reply(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size);
/* Sends what is held back. */
void eb_let_go(struct eb_connection *c);
/* Whether frames wait for room in the socket. */
bool eb_is_blocked(const struct eb_connection *c);
/* The reason is sent if the socket takes it at once; who sends what he may not is owed no more. */
__attribute__((format(printf, 2, 3))) void eb_refuse(struct eb_connection *c, const char *format, ...);
void eb_close_connection(struct eb_connection *c);
/* Lets go of a connection that is closed, once nothing else needs it. */
void eb_release(struct eb_connection *c);

/* -- commands.c: from the request to the end of the process -- */

void eb_on_spawn(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_signal(struct eb_connection *c, const struct eb_frame *frame);
void eb_finish_start(struct eb_connection *c);
/* Finishes the quiet starts whose programs run. */
void eb_notice_starts(void);
void eb_reap(void);
/* Signals the process group of the connection's live command, or it alone if it leads none. */
void eb_kill(const struct eb_connection *c, int number);
/* Whether nothing is left of a command that is being ended: neither itself nor its group. */
bool eb_command_gone(const struct eb_connection *c);
/* Its time is over. */
void eb_kill_command(struct eb_connection *c);
/* The client has gone: what that means for its command is the request's choice. */
void eb_abandon_command(struct eb_connection *c);
/* Whether a SPAWN would be welcome. */
bool eb_at_rest(const struct eb_connection *c);

/* -- streams.c: standard input and output as frames -- */

/* Makes the pipes that the request names; `ends` are the command's, -1 elsewhere. */
bool eb_streams_make(struct eb_connection *c, int ends[3]);
/* Moves output again, as far as the socket takes it; ends when there is nothing more to come. */
void eb_streams_resume(struct eb_connection *c);
void eb_streams_close(struct eb_connection *c);
/* Takes what is there of output that nobody has looked at yet. */
void eb_streams_gather(struct eb_connection *c);
/* Whether it is time to watch such output. */
bool eb_streams_are_due(struct eb_connection *c, uint64_t now);
void eb_on_stdin(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_stream(struct eb_connection *c, int number);

/* -- control.c: what server and helper tell each other -- */

void eb_on_adopt(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_drain(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_end(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_query(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_grant(struct eb_connection *c, const struct eb_frame *frame);
/* Takes no command any more: closes the connections that are at rest now, and the others when they are. */
void eb_drain(void);
/* Closes a connection over which nothing is under way; false: it is another. */
bool eb_close_if_at_rest(struct eb_connection *c);
/* The control socket is at its end. */
void eb_server_gone(void);
/* Tells the server something of a connection; WANT, DONE or CLOSED. */
void eb_tell(enum eb_kind kind, const struct eb_connection *c);
/* Tells the caller whose rights this process has; false if memory is short or the caller has gone. */
bool eb_tell_ids(void);
void eb_set_max_tasks(uint64_t count);
/* For the REPORT of a daemon's helper.  They are kept in a file of the server's, who has them there if this
 * process is killed; with -1, in memory of this process. */
bool eb_keep_figures(int fd);
/* These do nothing where no figures are kept. */
void eb_count_start(void);
/* How long a start took. */
void eb_count_time(uint64_t microseconds);
void eb_count_failure(enum eb_stage stage, int error);
void eb_count_end(void);

#endif
