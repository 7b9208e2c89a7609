#include "spawn/proctree.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#define SYS_pidfd_send_signal 424
#endif

#define CHILDREN "/proc/thread-self/children"

enum {
    CHUNK = 512,     /* bytes of a list of children that one read takes */
    MOST_DEPTH = 40, /* deeper descendants are reached when those above them have ended */
    MOST_NAME = 48,
    MOST_PASSES = 100,
};

bool eb_tree_can_be_read(void)
{
    char name[16];
    ssize_t size = readlink("/proc/self", name, sizeof name - 1);
    if (size <= 0)
        return false;
    name[size] = '\0';
    /* In a /proc of another PID namespace, these numbers belong to other processes. */
    return atoi(name) == getpid() && access(CHILDREN, F_OK) == 0;
}

/* -- lists of children -- */

struct list {
    long fd;
    long size, at;
    char text[CHUNK];
};

/* The next pid of the list, or 0.  The end of the buffer may cut a number in two. */
static EB_BARE pid_t next_pid(struct list *l)
{
    pid_t pid = 0;
    for (;;) {
        if (l->at == l->size) {
            l->at = 0;
            l->size = eb_raw(SYS_read, l->fd, (long)l->text, sizeof l->text, 0);
            if (l->size <= 0) {
                l->size = 0;
                return pid;
            }
        }
        char c = l->text[l->at++];
        if (c >= '0' && c <= '9')
            pid = pid * 10 + (c - '0');
        else if (pid != 0)
            return pid;
    }
}

/* -- descendants that are not children -- */

/*
 * Their pids may be reused: a parent may wait for a process at any moment, and another process may then get its number.
 * So each process is signalled through a pidfd, after a check, once the pidfd is open, that it is still a child of the
 * process above it, and that its parent has not been waited for.
 */
struct path {
    char text[MOST_NAME];
    int size;
};

static EB_BARE void append(struct path *p, const char *text)
{
    while (*text != '\0' && p->size < MOST_NAME - 1)
        p->text[p->size++] = *text++;
    p->text[p->size] = '\0';
}

static EB_BARE void append_number(struct path *p, pid_t number)
{
    char digits[12];
    int at = sizeof digits - 1;
    digits[at] = '\0';
    do
        digits[--at] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    append(p, &digits[at]);
}

static EB_BARE long open_of(pid_t pid, const char *name, int flags)
{
    struct path path;
    path.size = 0;
    append(&path, "/proc/");
    append_number(&path, pid);
    append(&path, name);
    return eb_raw(SYS_openat, AT_FDCWD, (long)path.text, O_RDONLY | O_CLOEXEC | flags, 0);
}

/* The fourth field of /proc/PID/stat, and in `state` the third; 0 if the process has gone. */
static EB_BARE pid_t parent_of(pid_t pid, char *state)
{
    *state = 'X';
    char text[128]; /* the second field is a name in parentheses, at most 15 bytes of any value */
    long fd = open_of(pid, "/stat", 0);
    if (fd < 0)
        return 0;
    long size = eb_raw(SYS_read, fd, (long)text, sizeof text, 0), at = size - 1;
    eb_raw(SYS_close, fd, 0, 0, 0);
    while (at >= 0 && text[at] != ')')
        at--;
    pid_t parent = 0;
    if (at >= 0 && at + 2 < size)
        *state = text[at + 2];
    for (at += 4; at > 3 && at < size && text[at] >= '0' && text[at] <= '9'; at++)
        parent = parent * 10 + (text[at] - '0');
    return parent;
}

static EB_BARE bool is_unreaped(long pidfd)
{
    return eb_raw(SYS_pidfd_send_signal, pidfd, 0, 0, 0) != -ESRCH;
}

struct walk {
    int number;
    int depth;
    unsigned signalled, refused; /* how many processes got the signal, and how many could not, because of their ids */
    unsigned running;            /* how many of the signalled ones were not stopped before */
};

static void walk_tasks(struct walk *w, pid_t pid, long pidfd);

/* The children in a list of one of the threads of `parent`; `parent_fd` is -1 for the calling process. */
static EB_BARE void walk_list(struct walk *w, long fd, pid_t parent, long parent_fd)
{
    struct list list;
    pid_t pid;
    list.size = list.at = 0;
    list.fd = fd;
    while ((pid = next_pid(&list)) != 0) {
        long pidfd = eb_raw(SYS_pidfd_open, pid, 0, 0, 0);
        if (pidfd < 0)
            continue;
        char state;
        pid_t of = parent_of(pid, &state);
        if (state != 'Z' && state != 'X' && (parent_fd < 0 || (of == parent && is_unreaped(parent_fd)))) {
            bool stops = w->number == SIGSTOP; /* parents first, because they make new children */
            long r = stops ? eb_raw(SYS_pidfd_send_signal, pidfd, SIGSTOP, 0, 0) : 0;
            w->running += r == 0 && state != 'T';
            w->depth++;
            if (w->depth < MOST_DEPTH)
                walk_tasks(w, pid, pidfd);
            w->depth--;
            if (!stops)
                r = eb_raw(SYS_pidfd_send_signal, pidfd, w->number, 0, 0);
            w->signalled += r == 0;
            w->refused += r == -EPERM;
        }
        eb_raw(SYS_close, pidfd, 0, 0, 0);
    }
}

struct entry {
    uint64_t inode;
    int64_t offset;
    uint16_t size;
    uint8_t type;
    char name[];
};

static EB_BARE void walk_tasks(struct walk *w, pid_t pid, long pidfd)
{
    _Alignas(8) char entries[256];
    long size, directory = open_of(pid, "/task", O_DIRECTORY);
    if (directory < 0)
        return;
    while ((size = eb_raw(SYS_getdents64, directory, (long)entries, sizeof entries, 0)) > 0)
        for (long at = 0; at < size;) {
            const struct entry *entry = (const void *)&entries[at];
            struct path path;
            path.size = 0;
            append(&path, entry->name);
            append(&path, "/children");
            at += entry->size;
            if (entry->name[0] == '.')
                continue;
            long fd = eb_raw(SYS_openat, directory, (long)path.text, O_RDONLY | O_CLOEXEC, 0);
            if (fd < 0)
                continue;
            walk_list(w, fd, pid, pidfd);
            eb_raw(SYS_close, fd, 0, 0, 0);
        }
    eb_raw(SYS_close, directory, 0, 0, 0);
}

static EB_BARE struct walk walk(int number)
{
    struct walk w = {.number = number};
    long fd = eb_raw(SYS_openat, AT_FDCWD, (long)CHILDREN, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return w; /* out of memory for a moment: the caller tries again */
    walk_list(&w, fd, 0, -1);
    eb_raw(SYS_close, fd, 0, 0, 0);
    return w;
}

EB_BARE void eb_tree_signal(int number)
{
    walk(number);
}

EB_BARE bool eb_tree_kill(bool again)
{
    /* A stopped process makes no others, and leaves the CPU to us.  But stopping takes time. */
    for (int pass = 0; again && pass < MOST_PASSES && walk(SIGSTOP).running > 0; pass++)
        ;
    struct walk w = walk(SIGKILL);
    return w.signalled > 0 || w.refused == 0;
}

#endif
