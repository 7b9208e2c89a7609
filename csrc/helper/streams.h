/*
 * A command's standard input and output, or its terminal, as frames.  The client's window bounds the input; output is
 * read from its pipe only while the socket takes it.
 */
#ifndef EB_STREAMS_H
#define EB_STREAMS_H

#include "helper/connection.h"

struct eb_streams {
    int fds[3];          /* our ends of the pipes; -1: none, or closed */
    uint8_t over;        /* a mark for the loop, bit n: close that one */
    uint8_t watched;     /* the loop's */
    bool ended;          /* the client has ended the input */
    bool terminal;       /* 0 and 1 are two descriptors of one terminal */
    uint8_t last;        /* the last byte of the input */
    uint64_t lazy_until; /* of eb_now_ms: output is not watched until then, or until the command's end; 0: it is watched
                            */
    uint64_t passed;     /* bytes of output that have been read */
    uint32_t window;     /* bytes of input that the client may send */
    uint32_t credit;     /* bytes of further input that it may send, and has not been told of */
    uint8_t *pending;    /* input that the pipe has not taken, EB_WINDOW at most; allocated */
    uint32_t pending_size;
};

/* Makes the pipes that the request names; `ends` are the command's ends, or -1.  False: see errno. */
bool eb_streams_make(struct eb_connection *c, const struct eb_request *q, int ends[3]);
/* Has the loop close them all. */
void eb_streams_abandon(struct eb_connection *c);
void eb_streams_free(struct eb_connection *c);
/* Whether to watch this one. */
bool eb_streams_want(const struct eb_connection *c, int number);
/* Reads output that has not been watched, because the command has ended. */
void eb_streams_gather(struct eb_connection *c);
/* Has such output watched when its time has come. */
void eb_streams_wake(struct eb_connection *c, uint64_t now);
void eb_on_stdin(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_winsize(struct eb_connection *c, const struct eb_frame *frame);
void eb_on_stream(struct eb_connection *c, int number);

#endif
