/*
 * A connection to the keeper.  The only output kept for it is the rest of a frame that its socket did not take whole;
 * until that rest has been sent, nothing more is sent or read.
 */
#ifndef EB_CLIENT_H
#define EB_CLIENT_H

#include "common/channel.h"
#include "keeper/keeper.h"
#include "keeper/ring.h"

#include <sys/ioctl.h>

enum { EB_MOST_CLIENTS = 256 }; /* starter and visitors */

enum eb_client_kind {
    EB_CLIENT_SERVER,  /* the server, which hands over the others */
    EB_CLIENT_STARTER, /* the first client, which may ask for the command */
    EB_CLIENT_VISITOR,
};

enum eb_following {
    EB_FOLLOWS_NOTHING, /* no FOLLOW has come */
    EB_FOLLOWS_OUTPUT,
    EB_FOLLOWS_END, /* EXITED is still to come */
};

struct eb_client {
    enum eb_keeper_source source; /* EB_KEEPER_CLIENT */
    enum eb_client_kind kind;
    struct eb_channel channel;
    bool opened, greeted; /* whether the NUL byte has come, and HELLO */
    bool closing;         /* nothing more is read; close it when what is kept for it has been sent, or: */
    bool broken;          /* at once */
    bool deaf;            /* the peer takes nothing any more; what it has sent before still counts */
    bool has_more;        /* there are frames to act on in the next turn */
    bool gone;            /* the peer has ended its side: close it when what it has typed has been written */
    uint64_t deadline;    /* of eb_now_ms: for the rest of what it must send; 0: none */

    enum eb_following follows;
    bool follows_on; /* also output that is still to come */
    bool caught_up;  /* CAUGHT_UP has been sent */
    int log_error;   /* the one that LOG_FAILED has reported to it */
    struct eb_cursor cursor;

    bool attached, writes;
    struct winsize window; /* 0 rows: none */
    uint8_t *typed;        /* input that the command has not taken, EB_WINDOW at most; allocated */
    uint32_t typed_size;
    uint32_t room;          /* bytes that it may send */
    uint64_t typing_served; /* the client with the least is served next */

    struct eb_watched watch; /* used by the loop */
    struct eb_client *next, *previous;
};

/* Makes a client of the socket `fd`.  NULL: memory is short, and `fd` is closed. */
struct eb_client *eb_client_new(int fd, enum eb_client_kind kind);
/* How many clients there are of a kind. */
unsigned eb_client_count(enum eb_client_kind kind);
/* Removes a client from the list, closes and frees it. */
void eb_client_free(struct eb_client *c);
/* Whether output waits for room in its socket. */
bool eb_client_is_blocked(const struct eb_client *c);
/* Sends what the socket did not take before. */
void eb_client_flush(struct eb_client *c);
/* Sends a frame. */
void eb_client_send(struct eb_client *c, enum eb_kind kind, const void *payload, size_t size);
void eb_client_send_piece(struct eb_client *c, const void *head, size_t head_size, const void *data, size_t size);
/* Sends the reason, and has the client closed. */
__attribute__((format(printf, 2, 3))) void eb_client_refuse(struct eb_client *c, const char *format, ...);

#endif
