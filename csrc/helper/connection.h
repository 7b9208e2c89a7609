/* One framed connection of the helper: what has arrived of the next frame, what is still to be sent. */
#ifndef EB_CONNECTION_H
#define EB_CONNECTION_H

#include "common/fdpass.h"
#include "spawn/request.h"
#include "spawn/spawn.h"

/* What an epoll event points to: a member of a connection, by which its owner is found. */
enum eb_source {
    EB_SOURCE_CONNECTION,
    EB_SOURCE_START,
    EB_SOURCE_STDIN, /* three in a row */
    EB_SOURCE_STDOUT,
    EB_SOURCE_STDERR,
    EB_SOURCE_CALLER,
    EB_SOURCE_SIGNALS,
};

/* A command's standard input and output that travel as frames. */
struct eb_streams {
    int fds[3];        /* ours of the pipes; -1: none, or closed */
    bool watched[3];
    bool ended;        /* the client has ended the input */
    uint64_t lazy_until; /* of eb_now_ms: output is not looked at before, or the command's end; 0: it is */
    uint64_t passed;   /* bytes of output */
    uint32_t window;   /* bytes of input that the client may send */
    uint32_t credit;   /* bytes that it could be told it may send more */
    uint8_t *pending;  /* input that the pipe has not taken, EB_WINDOW at most; allocated */
    uint32_t pending_size;
};

enum { EB_MOST_TITLE = 200 };

struct eb_connection {
    enum eb_source source;       /* EB_SOURCE_CONNECTION */
    enum eb_source start_source; /* EB_SOURCE_START */
    enum eb_source stream_sources[3]; /* EB_SOURCE_STDIN and its neighbours */
    int fd; /* -1: closed; the rest lives until its start and its child have ended */
    uint32_t id;
    bool control, greeted, opened; /* opened: the NUL byte has come; greeted: the peer's HELLO */
    bool released; /* among the dead */
    bool watched;
    uint32_t events; /* watched for */
    bool starting;
    bool brief;      /* the command's frames are held back, to go together */
    bool held;       /* `out` holds such frames */
    bool wordy;      /* the last command had much to say */
    uint64_t held_until; /* of eb_now_ms */
    bool ask, wanting, granted; /* ask: each start needs a GRANT */
    bool on_close;   /* the command is ended with the connection: SIGTERM, and SIGKILL after so long */
    bool dying;      /* that has begun */
    int group_fd;    /* the pidfd by which the group of a dying command is told when its leader has gone */
    uint32_t on_close_ms;
    uint64_t deadline; /* of eb_now_ms: for the rest of a frame, or for SIGKILL; 0: none */
    uint64_t begun_ns;
    struct eb_start start;
    struct eb_request request; /* its strings are in the frame at the head of `in` */
    struct eb_peer *peer;      /* whose ids its commands get; NULL: this process's */
    struct eb_streams *streams;
    pid_t child; /* live and ours; 0: none */
    uint64_t child_since; /* milliseconds since 1970 */
    /* The beginning of its argv, for the report.  Not allocated: it would outlive the buffers around it,
     * and keep their pages after a burst. */
    uint8_t title[EB_MOST_TITLE], title_size;
    pid_t client;
    uid_t client_uid;
    uint8_t *in;
    size_t in_at, in_size, in_capacity; /* in_size bytes from in_at on are not consumed */
    struct eb_fds fds;
    const struct ucred *only; /* who alone may ask for anything; NULL: whoever sends */
    bool foreign;             /* something of what is not consumed came from another */
    uint8_t *out;
    size_t out_size;
    struct eb_connection *next, *previous; /* among all; or next among the dead */
    struct eb_connection *next_child;      /* in its bucket of the child table */
    struct eb_connection *next_quiet;      /* among the quiet starts */
};

struct eb_frame {
    uint8_t kind;
    const uint8_t *payload;
    uint32_t size;
};

/* Reads once.  1: something came; 0: nothing now; -1: the peer is gone or memory is short. */
int eb_connection_fill(struct eb_connection *c);
/* 1: `frame` is the whole first one; 0: more is needed; -1: no frame of this protocol. */
int eb_connection_frame(const struct eb_connection *c, struct eb_frame *frame);
/* Removes the first `size` bytes. */
void eb_connection_consume(struct eb_connection *c, size_t size);
/* Sends a frame, or keeps what the socket does not take; false: the peer is gone or memory is short. */
bool eb_connection_send(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size);
/* Keeps a frame, to be sent with the next ones; false: memory is short. */
bool eb_connection_hold(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size);
/* Sends what was kept. */
bool eb_connection_flush(struct eb_connection *c);
/* Closes the socket and all descriptors, frees all buffers but those of the command. */
void eb_connection_close(struct eb_connection *c);

#endif
