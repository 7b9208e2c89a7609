/*
 * The only definition of the wire protocol between a client and errand-boy-helper.
 *
 * A connection is a Unix stream socket.  The client's first byte is NUL (a text request cannot start with one).  After
 * it, and from the helper at once, both directions carry frames:
 *
 *     u32 length of the payload | u8 kind | payload
 *
 * Integers are little-endian, without padding.  Each side's first frame is HELLO, except that a helper sends none on
 * its control socket.  A client need not wait for the helper's HELLO before it sends its first request.
 *
 * Descriptors travel as SCM_RIGHTS with any bytes of the frame that they belong to (the kernel allows 253 for each
 * sendmsg), in the frame's order; the last ones come with the frame's last byte at the latest.
 */
#ifndef EB_WIRE_H
#define EB_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EB_VERSION 1

enum {
    EB_HEADER_SIZE = 5,
    EB_MAX_FRAME = 16 << 20,   /* more than execve(2) accepts: 6 MiB on Linux */
    EB_MAX_STRINGS = 1 << 20,  /* execve counts a pointer for each string against the same 6 MiB */
    EB_MAX_FDS = 1 << 16,      /* descriptors of one request */
    EB_MAX_FDS_PER_SEND = 253, /* SCM_MAX_FD of the kernel */
    EB_MAX_RLIMITS = 16,
    EB_MAX_PROCESSES = 4096,  /* the highest limit of processes: a larger tree always exceeds its limit */
    EB_MAX_GROUPS = 1 << 16,  /* NGROUPS_MAX */
    EB_MAX_AFFINITY = 1024,   /* bytes of a CPU mask: 8,192 CPUs, the kernel's limit */
    EB_MAX_PLACES = 64,       /* of a QUEUE */
    EB_MAX_REASON = 200,      /* bytes of a reason text */
    EB_WINDOW = 64 << 10,     /* bytes of STDIN in flight */
    EB_MAX_OUTPUT = 64 << 10, /* bytes of one STDOUT or STDERR */
    EB_MAX_JOB = 4 << 10,     /* bytes of a JOB */
    EB_MAX_NOTIFY = 64 << 10, /* bytes of a NOTIFY */
    EB_MAX_WRITERS = 16,      /* connections that ATTACH to write to one job */
    EB_WHOLE_TREE = -1,       /* a pid of SIGNAL */
    EB_ENDS_GROUP = 1 << 8,   /* added to a signal's number */
};

enum eb_kind {
    /* either side's first frame, except for EB_STATUS and EB_JOB */
    EB_HELLO = 1, /* u32 version */

    /* client to helper */
    EB_SPAWN = 3,    /* options, see eb_tag */
    EB_SIGNAL = 4,   /* i32 pid | i32 signal number.  The pid is this connection's live child, or its negative for the
                        process group, as for kill(2), or 0 for the child, whatever its pid, or -1 for the whole tree of
                        a child with SUPERVISE; otherwise the frame is dropped.  With EB_ENDS_GROUP added to the number,
                        and the group as the pid, what is left of the group when the child ends gets SIGKILL */
    EB_STDIN = 10,   /* bytes for a streamed standard input; empty: its end */
    EB_WINSIZE = 11, /* u32 rows | u32 columns | u32 * 2: the same in pixels; for a TERMINAL, otherwise dropped */

    /* client to daemon, its first frame instead of HELLO */
    EB_STATUS = 5, /* u32 version; answered by STATUS_REPLY, then the daemon closes the connection */
    EB_JOB = 12,   /* u32 version | u8 eb_job_operation | JSON; answered by JOB_REPLY.  After the reply to START, or to
                      OPEN for a job that runs, the connection begins anew, with the job's keeper: NUL and HELLO */

    /* client to a job's keeper, to which SPAWN, SIGNAL, STDIN and WINSIZE go too */
    EB_NOTIFY = 13, /* options of a command that is run when the job is over; before SPAWN, and without descriptors */
    EB_FOLLOW =
        14, /* u64 first sequence that is wanted, 0: all that is kept | u64 * 2: bytes of standard output and error that
                       the follower has received or knows to be missed | u8 eb_follow; answered by PIECEs, CAUGHT_UP,
                       and EXITED when the job is over */
    EB_ATTACH = 15, /* u8 eb_attach | u32 * 4 of WINSIZE; 0 rows: none */

    /* helper to client */
    EB_SPAWNED = 16, /* i32 pid | u8 eb_owner */
    EB_FAILED = 17,  /* i32 pid that the caller must wait for, 0: none | i32 errno | u8 eb_stage | u8 member: which of
                        the things that the step sets was refused (a resource), or 0 */
    EB_EXITED = 18,  /* i32 wait status | u64 * 9: user and system time (microseconds), peak resident set (KiB), minor
                        and major faults, blocks in and out, voluntary and involuntary context switches | with
                        SUPERVISE: u8 eb_cause | u64 * 3: user and system time of the tree, its peak memory (bytes) |
                        u32 the most processes that were seen */
    EB_REFUSED = 19, /* UTF-8 reason; the sender closes the connection after it */
    EB_STDOUT = 20,  /* bytes of a streamed standard output; empty: its end */
    EB_STDERR = 21,
    EB_CREDIT = 22, /* u32: how many more bytes of STDIN may be sent, beyond the first EB_WINDOW */
    EB_UNREAD = 30, /* empty; a private helper is about to end: it closes the connection after this, and has
                        read nothing that was sent since the connection's last command was over */

    /* keeper to client, in addition to SPAWNED, FAILED, EXITED and CREDIT */
    EB_PIECE = 33,      /* u64 sequence | u64 microseconds since 1970 | u8 stream, 1 or 2 | bytes */
    EB_MISSED = 34,     /* u8 stream | u64: how many bytes were overwritten before the follower had received them */
    EB_CAUGHT_UP = 35,  /* empty: all output so far has been sent; once for each FOLLOW */
    EB_LOG_FAILED = 36, /* i32 errno: the log lacks output from here on, or is not rotated */

    /* daemon to client */
    EB_STATUS_REPLY = 23, /* JSON */
    EB_JOB_REPLY = 37,    /* JSON */

    /* server to helper, on its control socket */
    EB_ADOPT = 2, /* u32 connection id | u8 eb_adopt; empty: 0 and 0.  One descriptor: a connection to serve */
    EB_DRAIN = 6, /* empty: close idle connections, and the others after the end of their command */
    EB_END = 7,   /* u8 signal number, sent to the process groups of all live commands */
    EB_QUERY = 8, /* empty; answered by REPORT */
    EB_GRANT = 9, /* u32 connection id, in answer to WANT */

    /* helper to server, on its control socket */
    EB_WANT = 24,   /* u32 connection id: this connection asks to start a command, and waits for GRANT */
    EB_DONE = 25,   /* u32 connection id: the command that was granted has ended or failed to start, or its WANT is
                        withdrawn */
    EB_CLOSED = 26, /* u32 connection id: the connection has gone */
    EB_FULL = 27,   /* empty: --max-tasks have been started; sent once */
    EB_REPORT = 28, /* see docs/protocol.md */
    EB_ENDED = 32,  /* see docs/protocol.md; for a command whose connection was adopted with EB_TELL_ENDS */

    /* private helper to its caller, on its control socket; IDS also comes from a daemon's helper that becomes a user */
    EB_IDS = 29,   /* u32 * 3: its real, effective and saved user id | u32 * 3: the same of its group |
                        u32 * n: its supplementary groups.  Its first frame */
    EB_STAYS = 31, /* empty: it takes no more requests, ends with the commands that it owns, and no longer shares the
                        caller's working directory, root and umask.  It closes the socket after this; without STAYS, the
                        socket is closed when the process ends */
};

/* How a connection is to be served. */
enum eb_adopt {
    EB_ASK = 1,       /* each start waits for GRANT */
    EB_TELL_ENDS = 2, /* an ENDED is sent for each command, even for one that does not start */
};

/* Operations of JOB. */
enum eb_job_operation {
    EB_JOB_START = 1,
    EB_JOB_LIST = 2,
    EB_JOB_OPEN = 3,
    EB_JOB_REMOVE = 4,
};

/* Which output is followed. */
enum eb_follow {
    EB_FOLLOW_ON = 1,    /* also output that is still to come; without this, CAUGHT_UP ends it */
    EB_FOLLOW_NEW = 2,   /* not the output that is already there */
    EB_FOLLOW_QUIET = 4, /* no output, only EXITED */
};

/* How a connection is attached to a job. */
enum eb_attach {
    EB_ATTACH_WRITES = 1,
    EB_ATTACH_REDRAWS = 2, /* the program is told that its terminal has changed */
};

/* Whose child the new process is, and so who must wait for it. */
enum eb_owner {
    EB_OWNER_CALLER = 0,
    EB_OWNER_HELPER = 1, /* EXITED follows on this connection */
};

/*
 * A SPAWN payload is a sequence of  u8 tag | u32 length | value, each tag at most once, in any order. A string list is
 * u32 count | count * (bytes, NUL).  What no option sets is inherited from the helper. The new process takes the steps
 * in the order of eb_stage.
 *
 * A tag that carries a descriptor has an empty value.  Its descriptor comes after those of FDS; the descriptors of
 * several such tags come in the order of the tags' numbers, whatever the order of the options.  The new process keeps
 * it for its step, and the program does not get it.
 */
enum eb_tag {
    EB_TAG_EXECUTABLES = 1, /* string list: paths to try in turn, as execvp(3) does; required */
    EB_TAG_ARGV = 2,        /* string list; required, may be empty */
    EB_TAG_ENV = 3,         /* string list */
    EB_TAG_FDS = 4,         /* u32 * n, ascending: the child's number for each descriptor sent; all
                               others are closed in the child */
    EB_TAG_CWD_FD = 5,      /* carries a descriptor: fchdir to it */
    EB_TAG_CWD = 6,         /* path, NUL: chdir, after CWD_FD */
    EB_TAG_UMASK = 7,       /* u32 */
    EB_TAG_SIGMASK = 8,     /* u64, bit n-1 for signal n: blocked signals */
    EB_TAG_SIGIGN = 9,      /* u64: ignored signals; all others get the default action */
    EB_TAG_SETSID = 10,     /* empty */
    EB_TAG_PGROUP = 11,     /* i32: setpgid(0, n) */
    EB_TAG_RLIMITS = 12,    /* n * (u8 resource | u64 soft | u64 hard) */
    EB_TAG_NICE = 13,       /* i32 */
    EB_TAG_AFFINITY = 14,   /* CPU mask as sched_setaffinity(2) takes it */
    EB_TAG_GROUPS = 15,     /* u32 * n: supplementary groups */
    EB_TAG_GID = 16,        /* u32: real, effective and saved */
    EB_TAG_UID = 17,        /* u32: real, effective and saved */
    EB_TAG_STREAMS = 18,    /* u8, bit n for descriptor n of 0 to 2: it is a pipe to the helper, whose data travel as
                               frames; EB_JOINED: 2 is the same pipe as 1.  Only for helpers that own their children */
    EB_TAG_ON_CLOSE = 19,   /* u32 milliseconds: if the connection ends before the command, its process group gets
                               SIGTERM, and after that time SIGKILL.  EB_LIVES_ON: it lives on.  By default it lives on,
                               or 1,000 if it is streamed */
    EB_TAG_NULL = 20,       /* u8, bit n for descriptor n of 0 to 2: it is /dev/null */
    EB_TAG_COALESCE = 21,   /* empty: no SPAWNED, and all other frames together, when the command is over, there are
                               many, or 50 ms have passed; EXITED has two more fields, u64 microseconds from the start
                               to the end and i32 pid */
    EB_TAG_SIGDEFAULT = 22, /* u64: signals that get the default action, whatever other tags say */
    EB_TAG_NO_NEW_PRIVS = 23,
    EB_TAG_SET_RLIMITS = 24,          /* as RLIMITS, and overrides it; a helper does not lower it to its own limits */
    EB_TAG_CONTROLLING_TERMINAL = 25, /* carries a descriptor: the session's controlling terminal */
    EB_TAG_FOREGROUND = 26,           /* empty: the process group is the foreground group of the controlling terminal */
    EB_TAG_CGROUP = 27,          /* carries a descriptor: the directory of the cgroup that the command starts in, or
                                    joins */
    EB_TAG_NAMESPACES = 28,      /* u32: flags of clone(2), CLONE_NEW...; in a new user namespace it has its own user
                               and group, under the same numbers */
    EB_TAG_SANDBOX = 29,         /* carries a descriptor: a Landlock ruleset to apply; implies NO_NEW_PRIVS */
    EB_TAG_SOCKETS = 30,         /* u8 eb_sockets: no others, no typing on a terminal (TIOCSTI), and unless it is ANY
                                    no io_uring and no keyrings; implies NO_NEW_PRIVS */
    EB_TAG_RENICE = 31,          /* i32: added to the niceness that the command would otherwise have */
    EB_TAG_SCHEDULER = 32,       /* u32 policy | u32 priority, as sched_setscheduler(2) takes them */
    EB_TAG_IONICE = 33,          /* u32, as ioprio_set(2) takes it */
    EB_TAG_TIMER_SLACK = 34,     /* u64: nanoseconds */
    EB_TAG_SIGNALS_DEFAULT = 35, /* u64: in addition to those of SIGDEFAULT */
    EB_TAG_SIGNALS_IGNORED = 36, /* u64: in addition to those of SIGIGN, whatever SIGDEFAULT says */
    EB_TAG_OOM_SCORE_ADJ = 37,   /* i32 */
    EB_TAG_ROOT = 38,            /* path, NUL: chroot, after CWD_FD; CWD is inside it, and / by default */
    EB_TAG_CAPABILITIES = 39,    /* u64, bit n for capability n: those that the program has, and can ever have */
    EB_TAG_SUPERVISE = 40, /* u8: 1: with all that it starts | u32 milliseconds: a supervisor ends the command when the
                               connection has ended, and with 1 also all that is left of its tree that long after the
                               command's end.  Only for helpers that own their children */
    EB_TAG_TERMINAL = 41,  /* u32 rows | u32 columns | u32 * 2: the same in pixels | u8 eb_terminal: streamed 0 and 1,
                                    and 2 if it is JOINED, are a new terminal, the controlling one; requires SETSID */
    EB_TAG_LIMITS = 42,    /* u64 microseconds | u64 microseconds of CPU time | u64 bytes | u32 processes; 0: no limit.
                              The supervisor kills a tree that uses more; requires SUPERVISE with 1 */
    EB_TAG_QUEUE = 43,     /* u32 queue | u8 places: it waits while so many others of its queue are under way.
                              Not for a daemon's clients */
    EB_TAG_END             /* one past the last */
};

/* How a TERMINAL differs from the kernel's default. */
enum eb_terminal {
    EB_NO_ECHO = 1,
    EB_RAW = 2, /* as after cfmakeraw(3) */
};

#define EB_JOINED 8             /* a bit of STREAMS */
#define EB_LIVES_ON 0xFFFFFFFFu /* of ON_CLOSE */

/* The limit of LIMITS that has been exceeded. */
enum eb_cause {
    EB_CAUSE_NONE = 0,
    EB_CAUSE_TIMEOUT = 1,
    EB_CAUSE_CPU = 2,
    EB_CAUSE_MEMORY = 3,
    EB_CAUSE_PROCESSES = 4,
};

/* Values of SOCKETS: the sockets that a command may make. */
enum eb_sockets {
    EB_SOCKETS_UNIX = 0,
    EB_SOCKETS_TCP = 1, /* and Unix ones */
    EB_SOCKETS_ANY = 2,
};

/* The step in which a start failed; the values are in the order of the steps. */
enum eb_stage {
    EB_STAGE_START = 1, /* making the process */
    EB_STAGE_FDS = 2,
    EB_STAGE_NAMESPACES = 3,
    EB_STAGE_CGROUP = 4,
    EB_STAGE_CWD = 5,
    EB_STAGE_UMASK = 6,
    EB_STAGE_SIGNALS = 7,
    EB_STAGE_SETSID = 8,
    EB_STAGE_PGROUP = 9,
    EB_STAGE_CONTROLLING_TERMINAL = 10,
    EB_STAGE_FOREGROUND = 11,
    EB_STAGE_OOM_SCORE_ADJ = 12,
    EB_STAGE_RLIMITS = 13,
    EB_STAGE_NICE = 14,
    EB_STAGE_AFFINITY = 15,
    EB_STAGE_SCHEDULER = 16,
    EB_STAGE_IONICE = 17,
    EB_STAGE_TIMER_SLACK = 18,
    EB_STAGE_ROOT = 19,
    EB_STAGE_CAPABILITIES = 20,
    EB_STAGE_GROUPS = 21,
    EB_STAGE_GID = 22,
    EB_STAGE_UID = 23,
    EB_STAGE_NO_NEW_PRIVS = 24,
    EB_STAGE_SANDBOX = 25,
    EB_STAGE_EXEC = 26,
    EB_STAGE_TREE = 27, /* before all others: /proc, or its lists of children, is missing */
    EB_STAGE_LOG = 28,  /* before all others: a job's log can't be opened */
    EB_STAGE_RING = 29, /* before all others: there is no room for a job's output, or for its end */
};

/* Reads integers and byte ranges; after the first read past the end, `bad` is set and all reads return 0. */
struct eb_reader {
    const uint8_t *at, *end;
    bool bad;
};

struct eb_reader eb_reader(const void *data, size_t size);
size_t eb_remaining(const struct eb_reader *r);
uint8_t eb_get_u8(struct eb_reader *r);
uint32_t eb_get_u32(struct eb_reader *r);
uint64_t eb_get_u64(struct eb_reader *r);
/* `size` bytes inside the reader's data, or NULL. */
const uint8_t *eb_get_bytes(struct eb_reader *r, size_t size);

/* Writes into a fixed buffer; data that does not fit is not written, and sets `bad`. */
struct eb_writer {
    uint8_t *start, *at, *end;
    bool bad;
};

struct eb_writer eb_writer(void *data, size_t size);
size_t eb_written(const struct eb_writer *w);
void eb_put_u8(struct eb_writer *w, uint8_t value);
void eb_put_u32(struct eb_writer *w, uint32_t value);
void eb_put_u64(struct eb_writer *w, uint64_t value);
void eb_put_bytes(struct eb_writer *w, const void *data, size_t size);

#endif
