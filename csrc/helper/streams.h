/*
 * A command's standard input and output, or its terminal, as frames.  Input is bounded by the window that its client was given; output
 * is read from its pipe only while the socket takes it.
 */
#ifndef EB_STREAMS_H
#define EB_STREAMS_H

#include "helper/connection.h"

struct eb_streams {
    int fds[3];          /* ours of the pipes; -1: none, or closed */
    uint8_t over;        /* a mark for the loop, bit n: close that one */
    uint8_t watched;     /* the loop's */
    bool ended;          /* the client has ended the input */
    bool terminal;       /* 0 and 1 are two descriptors of one */
    uint8_t last;        /* byte of the input */
    uint64_t lazy_until; /* of eb_now_ms: output is not looked at before, or the command's end; 0: it is */
    uint64_t passed;     /* bytes of output */
    uint32_t window;     /* bytes of input that the client may send */
    uint32_t credit;     /* bytes that it could be told it may send more */
    uint8_t *pending;    /* input that the pipe has not taken, EB_WINDOW at most; allocated */
    uint32_t pending_size;
};

/* Makes the pipes that the request names; `ends` are the command's, -1 elsewhere.  False: see errno. */
bool eb_streams_make(struct eb_connection *c, const struct eb_request *q, int ends[3]);
/* Has the loop close them all. */
void eb_streams_abandon(struct eb_connection *c);
void eb_streams_free(struct eb_connection *c);
/* Whether an event of this one is wanted. */
bool eb_streams_want(const struct eb_connection *c, int number);
/* Reads output that is there and has not been watched, because the command has ended. */
void eb_streams_gather(struct eb_connection *c);
/* Has such output watched if it is time. */
void eb_streams_wake(struct eb_connection *c, uint64_t now);
void eb_on_stdin(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_winsize(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_stream(struct eb_connection *c, int number);

#endif
