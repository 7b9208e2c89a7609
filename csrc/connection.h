/* One framed connection of the helper: what has arrived of the next frame, what is still to be sent. */
#ifndef EB_CONNECTION_H
#define EB_CONNECTION_H

#include "fdpass.h"
#include "request.h"
#include "spawn.h"

/* What an epoll event points to. */
enum eb_source { EB_SOURCE_CONNECTION, EB_SOURCE_START, EB_SOURCE_CALLER, EB_SOURCE_CHILDREN };

struct eb_connection {
    enum eb_source source; /* EB_SOURCE_CONNECTION */
    enum eb_source start_source; /* EB_SOURCE_START */
    int fd; /* -1: closed; the rest lives until its start and its child have ended */
    bool control, greeted, opened; /* opened: the NUL byte has come; greeted: the peer's HELLO */
    bool watched, hungry; /* in the epoll set; hungry: for room to send */
    bool starting;
    struct eb_start start;
    struct eb_request request; /* its strings are in the frame at the head of `in` */
    pid_t child; /* live and ours; 0: none */
    uint8_t *in;
    size_t in_size, in_capacity;
    struct eb_fds fds;
    uint8_t *out;
    size_t out_size;
    struct eb_connection *next;       /* among the closed ones */
    struct eb_connection *next_child; /* in its bucket of the child table */
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
bool eb_connection_send(struct eb_connection *c, enum eb_kind kind, const struct eb_writer *payload);
/* Sends what was kept. */
bool eb_connection_flush(struct eb_connection *c);
/* Closes the socket and all descriptors, frees all buffers. */
void eb_connection_close(struct eb_connection *c);

#endif
