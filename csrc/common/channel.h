/* Frames over a Unix stream socket: the part of the next one that has arrived, and the data still to be sent. */
#ifndef EB_CHANNEL_H
#define EB_CHANNEL_H

#include "common/fdpass.h"

#include <stdarg.h>

struct eb_channel {
    int fd; /* -1: closed */
    struct eb_fds fds;
    uint8_t *in;
    size_t in_at, in_size, in_capacity; /* in_size bytes from in_at on have not been consumed */
    uint8_t *out;
    size_t out_size;
};

struct eb_frame {
    uint8_t kind;
    const uint8_t *payload;
    uint32_t size;
};

/* Reads once.  1: data came; 0: none is there now; -1: the peer has gone or memory is short.  `sender` as for
 * eb_receive. */
int eb_channel_fill(struct eb_channel *c, struct ucred *sender);
/* Whether the last read has taken everything that was there. */
bool eb_channel_is_drained(const struct eb_channel *c);
/* 1: `frame` is the first frame, complete; 0: more data is needed, but `frame` has its kind and size if its header
 * has come; -1: this is not a frame of the protocol. */
int eb_channel_frame(const struct eb_channel *c, struct eb_frame *frame);
/* Removes the first `size` bytes. */
void eb_channel_consume(struct eb_channel *c, size_t size);
/* Removes the first frame, a complete one, and returns its payload in memory that the caller frees; NULL: memory is
 * short. */
uint8_t *eb_channel_take(struct eb_channel *c, struct eb_frame *frame);
/* Sends a frame, whose payload is in two parts, and keeps what the socket does not take; with `hold`, keeps all of
 * it. False: the peer has gone or memory is short. */
bool eb_channel_send(struct eb_channel *c, enum eb_kind kind, const void *first, size_t first_size, const void *second,
                     size_t second_size, bool hold);
/* Sends REFUSED with a reason, if the socket takes it at once. */
__attribute__((format(printf, 2, 0))) void eb_channel_refuse(struct eb_channel *c, const char *format,
                                                             va_list arguments);
/* Sends what has been kept.  False: the peer has gone. */
bool eb_channel_flush(struct eb_channel *c);
/* Closes the socket and all descriptors, frees all buffers. */
void eb_channel_close(struct eb_channel *c);

#endif
