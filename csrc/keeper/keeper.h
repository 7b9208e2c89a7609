/*
 * A job's keeper: the parent of one command, which outlives the client that asked for it.  It keeps the command's
 * output in rings, serves the clients that follow it or type, records the end in the journal, and ends with the job.
 *
 * Calls go one way: main -> loop -> frames -> command, attach -> follow -> client -> ring, journal, log.  Only the loop
 * has the epoll set, and frees clients; it gives each client a turn in each round, so the other parts need not leave
 * marks for it.
 */
#ifndef EB_KEEPER_H
#define EB_KEEPER_H

#include "common/clock.h"
#include "owner/process.h"
#include "owner/self.h"
#include "spawn/spawn.h"

/* Descriptors with which it is started. */
enum {
    EB_CONTROL_FD = 3, /* the server, which hands over the first connection */
    EB_LISTENER_FD = 4,
    EB_RING_FD = 5,
    EB_JOURNAL_FD = 6,
};

/* What an epoll event points to. */
enum eb_keeper_source {
    EB_KEEPER_SIGNALS,
    EB_KEEPER_LISTENER,
    EB_KEEPER_START,
    EB_KEEPER_NOTIFY,
    EB_KEEPER_STDIN, /* three in a row */
    EB_KEEPER_STDOUT,
    EB_KEEPER_STDERR,
    EB_KEEPER_CLIENT,
};

/* A descriptor, and how it is watched. */
struct eb_watched {
    int fd; /* -1: it is not watched */
    uint32_t events;
};

enum eb_keeper_state {
    EB_KEEPER_NEW, /* no client has asked for the command yet */
    EB_KEEPER_STARTING,
    EB_KEEPER_RUNNING,
    EB_KEEPER_OVER, /* the command has ended, or could not be started */
};

struct eb_keeper {
    /* Set by main. */
    struct eb_self self;
    const struct eb_spawner *spawner;
    uid_t server; /* the user that may hand over connections */
    uint64_t ring_size, frame_timeout_ms, linger_ms;
    int null_fd;

    enum eb_keeper_state state;
    bool terminal;       /* 0 and 1 are two descriptors of one terminal */
    int fds[3];          /* our ends of the command's standard streams; -1: none, or closed */
    uint8_t over;        /* a mark for the loop, bit n: close that one */
    uint64_t hung_until; /* of eb_now_ms: no output can be read, nor input written, until then; 0: they can */
    struct eb_start start;
    pid_t child; /* not yet waited for; 0: none */
    uint8_t exited[EB_MOST_EXITED];
    size_t exited_size;
    uint64_t over_ms; /* of eb_now_ms */

    struct eb_client *clients;
    bool adopted;  /* the first client other than the server has come */
    int log_error; /* the errno to report to followers; 0: none */
    uint64_t wake; /* of eb_now_ms: the latest time for the next round; 0: none; set anew in each round */
};

extern struct eb_keeper keeper;

static inline bool eb_keeper_has(int number)
{
    return keeper.fds[number] >= 0 && !(keeper.over >> number & 1);
}

/* Has the loop close one of `fds`. */
static inline void eb_keeper_close(int number)
{
    keeper.over |= (uint8_t)(1 << number);
}

static inline void eb_keeper_wake_by(uint64_t when)
{
    if (keeper.wake == 0 || when < keeper.wake)
        keeper.wake = when;
}

#endif
