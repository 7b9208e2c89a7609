/*
 * One framed connection: the part of the next frame that has arrived, and the data still to be sent.
 *
 *   state                                       frames that it takes
 *   NEW      until HELLO                        HELLO
 *   REST     no command                         SPAWN; SIGNAL and STDIN that are late
 *   BUSY     a command runs, or its output is   SIGNAL, STDIN
 *            still to come
 *   CONTROL  the control socket, after HELLO    what the server says
 *
 * It takes no frames while its command waits for GRANT, or for the outcome of its start (see command.h), nor while the
 * connection is blocked: then neither frames nor output are read until the socket has taken what is kept for it.  While
 * corked, it keeps frames that are to go together, and reads on.  While closing, it only waits for the loop to close
 * it.
 */
#ifndef EB_CONNECTION_H
#define EB_CONNECTION_H

#include "common/channel.h"
#include "helper/helper.h"

struct eb_connection {
    enum eb_source source;            /* EB_SOURCE_CONNECTION */
    enum eb_source stream_sources[3]; /* EB_SOURCE_STDIN and the two after it */
    struct eb_channel channel;
    uint32_t id; /* the server's number for it */
    bool control;
    bool asks;            /* each start needs a GRANT */
    bool tells_ends;      /* the server gets an ENDED for each command */
    bool opened, greeted; /* the NUL byte has come; and the peer's HELLO */
    bool ended;           /* the peer has ended its side, but we still send */
    /* Marks for the loop. */
    bool marked;  /* in its list */
    bool closing; /* nothing more is read or sent, and the loop must close it */
    /* The loop's. */
    bool watched;
    uint32_t events;         /* those that are watched for */
    uint64_t frame_deadline; /* of eb_now_ms: for the rest of a frame; 0: none */

    struct eb_command *command; /* requested, starting or running, or NULL */
    /* Memory for the next command, while there is none.  It is allocated with the connection: if it were allocated
     * for each command, it would outlive the buffers around it, and keep their pages in use after a burst. */
    struct eb_command *spare;
    struct eb_streams *streams;        /* the command's standard streams, which may outlast it, or NULL */
    struct eb_connection *next_queued; /* queue.c's */
    uint32_t queue;                    /* that it is in, see queue.h, */
    uint8_t places;                    /* and how many that has; 0: it is in none */
    uint8_t place;                     /* the one that it has, from 1; 0: none */
    bool coalesces;                    /* the command's frames are sent together */
    bool corked;                       /* `out` holds such frames back, at most until `corked_until` */
    bool large_output;                 /* the last command wrote much */
    uint64_t corked_until;             /* of eb_now_ms */

    const struct ucred *only;              /* the only process that may ask for anything; NULL: any process */
    bool foreign;                          /* some of the data that is not consumed came from another sender */
    struct eb_connection *next, *previous; /* in the list of all; or `next` in the list of the dead */
    struct eb_connection *next_marked;
};

/* Makes a connection of the socket `fd`, one of helper.connections, and says HELLO.  NULL: memory is short, and `fd`
 * is closed. */
struct eb_connection *eb_connection_new(int fd, uint32_t id, uint8_t flags, bool control);
/* Has the loop handle it: the data that has arrived, its marks, and those of its command and streams. */
void eb_mark(struct eb_connection *c);
/* Has the loop close it. */
void eb_mark_closing(struct eb_connection *c);

/* Reads once.  1: data came; 0: none is there now; -1: the peer has gone or memory is short. */
int eb_connection_fill(struct eb_connection *c);
/* Sends a frame, or holds it back for a moment if the command's frames are sent together. */
void eb_reply(struct eb_connection *c, enum eb_kind kind, const void *payload, size_t size);
void eb_reply_u32(struct eb_connection *c, enum eb_kind kind, uint32_t number);
/* Sends REFUSED with the reason, if the socket takes it at once, and has the loop close the connection. */
__attribute__((format(printf, 2, 3))) void eb_refuse(struct eb_connection *c, const char *format, ...);
/* Sends what is held back. */
void eb_uncork(struct eb_connection *c);
/* Sends what the socket did not take before. */
void eb_connection_flush(struct eb_connection *c);
/* Whether neither a command nor its output is in progress. */
bool eb_is_at_rest(const struct eb_connection *c);
/* Whether frames wait for room in the socket. */
bool eb_is_blocked(const struct eb_connection *c);
/* Closes the socket and all descriptors, frees all buffers. */
void eb_connection_close(struct eb_connection *c);

#endif
