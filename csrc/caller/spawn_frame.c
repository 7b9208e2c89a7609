#include "caller/spawn_frame.h"

#include "common/descriptor.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

extern char **environ;

enum {
    KEEP = 64 << 10,      /* bytes of a frame whose memory is kept for the next one */
    MOST_OF_STATE = 2048, /* bytes of the options that put_state writes */
    OPTION_HEADER = 5,
    MOST_BUILDS = 100, /* attempts to build one frame while the environment grows */
};

static void put_option(struct eb_writer *w, enum eb_tag tag, size_t size)
{
    eb_put_u8(w, tag);
    eb_put_u32(w, (uint32_t)size);
}

/* A bit for each tag. */
static uint64_t tags_of(const uint8_t *options, size_t size)
{
    struct eb_reader r = eb_reader(options, size);
    uint64_t tags = 0;
    while (eb_remaining(&r) > 0 && !r.bad) {
        uint8_t tag = eb_get_u8(&r);
        tags |= tag < EB_TAG_END ? (uint64_t)1 << tag : 0;
        (void)eb_get_bytes(&r, eb_get_u32(&r));
    }
    return tags;
}

/* Adds the caller's state, except for the tags that are `given`. */
static void put_state(struct eb_writer *w, const struct eb_caller *c, int flags, uint64_t given)
{
    const struct eb_state *s = &c->state;
    if (!(given >> EB_TAG_SIGMASK & 1)) {
        put_option(w, EB_TAG_SIGMASK, 8);
        eb_put_u64(w, s->sigmask);
    }
    put_option(w, EB_TAG_SIGIGN, 8);
    eb_put_u64(w, s->sigign);
    if (flags & EB_WITH_PGROUP && s->pgrp != 0) { /* 0: it is of another pid namespace, and the helper is in it too */
        put_option(w, EB_TAG_PGROUP, 4);
        eb_put_u32(w, (uint32_t)s->pgrp);
    }
    if (flags & EB_WITH_UMASK && !(given >> EB_TAG_UMASK & 1)) {
        put_option(w, EB_TAG_UMASK, 4);
        eb_put_u32(w, c->umask);
    }
    if (flags & EB_WITH_CWD)
        put_option(w, EB_TAG_CWD_FD, 0);
    put_option(w, EB_TAG_RLIMITS, EB_MAX_RLIMITS * 17);
    for (int i = 0; i < EB_MAX_RLIMITS; i++) {
        eb_put_u8(w, (uint8_t)i);
        eb_put_u64(w, s->rlimits[i].rlim_cur);
        eb_put_u64(w, s->rlimits[i].rlim_max);
    }
    put_option(w, EB_TAG_NICE, 4);
    eb_put_u32(w, (uint32_t)s->nice);
    if (s->affinity_size > 0 && !(given >> EB_TAG_AFFINITY & 1)) {
        put_option(w, EB_TAG_AFFINITY, s->affinity_size);
        eb_put_bytes(w, s->affinity, s->affinity_size);
    }
}

/* Begins an option whose size is known only when it has been written; returns where the size goes. */
static uint8_t *open_option(struct eb_writer *w, enum eb_tag tag)
{
    put_option(w, tag, 0);
    return w->bad ? NULL : w->at - 4;
}

static void put_number(uint8_t *at, size_t number)
{
    struct eb_writer w = eb_writer(at, 4);
    eb_put_u32(&w, (uint32_t)number);
}

static void put_environment(struct eb_writer *w)
{
    uint8_t *size_at = open_option(w, EB_TAG_ENV);
    uint32_t count = 0;
    eb_put_u32(w, 0);
    for (char **e = environ; e != NULL && *e != NULL; e++, count++) {
        eb_put_bytes(w, *e, strlen(*e));
        eb_put_u8(w, 0);
    }
    if (w->bad)
        return;
    put_number(size_at, (size_t)(w->at - size_at) - 4);
    put_number(size_at + 4, count);
}

static size_t size_of_environment(void)
{
    size_t size = 4;
    for (char **e = environ; e != NULL && *e != NULL; e++)
        size += strlen(*e) + 1;
    return size;
}

/* Fills o->fds; returns 0 or ENOMEM. */
static int collect_fds(struct eb_spawn_frame *o, int found, const struct eb_wanted_fds *wanted, struct eb_writer *w)
{
    uint32_t most = wanted->other_count + 4 + wanted->carried_count; /* 4: 0 to 2, and the working directory */
    if (most > o->fd_capacity) {
        int *fds = realloc(o->fds, most * sizeof *fds);
        if (fds == NULL)
            return ENOMEM;
        o->fds = fds;
        o->fd_capacity = most;
    }
    uint32_t next = 0, count = 0;
    uint8_t *size_at = open_option(w, EB_TAG_FDS);
    for (int number = 0; number < 3; number++) {
        bool kept = next < wanted->other_count && wanted->others[next] == number;
        next += kept;
        if (wanted->standard[number] >= 0)
            o->fds[count++] = wanted->standard[number];
        else if (kept || found & EB_HAS_STDIN << number)
            o->fds[count++] = number;
        else
            continue;
        eb_put_u32(w, (uint32_t)number);
    }
    for (; next < wanted->other_count; next++) {
        o->fds[count++] = wanted->others[next];
        eb_put_u32(w, (uint32_t)wanted->others[next]);
    }
    if (size_at != NULL)
        put_number(size_at, count * 4);
    o->fd_count = count;
    return 0;
}

static int reserve(struct eb_spawn_frame *o, size_t size)
{
    if (size <= o->capacity)
        return 0;
    free(o->frame);
    o->capacity = 0;
    o->frame = malloc(size + size / 4);
    if (o->frame == NULL)
        return ENOMEM;
    o->capacity = size + size / 4;
    return 0;
}

static int build(struct eb_spawn_frame *o, int found, int flags, const uint8_t *options, size_t options_size,
                 const struct eb_wanted_fds *wanted)
{
    size_t environment = flags & EB_WITH_ENVIRONMENT ? size_of_environment() : 0;
    o->size = o->sent = o->fd_count = 0;
    size_t most = EB_HEADER_SIZE + options_size + MOST_OF_STATE + OPTION_HEADER + environment + OPTION_HEADER +
                  ((size_t)wanted->other_count + 3) * 4;
    if (most > EB_HEADER_SIZE + (size_t)EB_MAX_FRAME)
        return E2BIG;
    int error = reserve(o, most);
    if (error != 0)
        return error;
    struct eb_writer w = eb_writer(o->frame, o->capacity);
    eb_put_u32(&w, 0);
    eb_put_u8(&w, EB_SPAWN);
    eb_put_bytes(&w, options, options_size);
    if (flags & EB_RESTORE_SIGNALS) {
        put_option(&w, EB_TAG_SIGDEFAULT, 8);
        eb_put_u64(&w, (uint64_t)1 << (SIGPIPE - 1) | (uint64_t)1 << (SIGXFSZ - 1));
    }
    if (!(flags & EB_WITHOUT_STATE))
        put_state(&w, &o->caller, flags, tags_of(options, options_size));
    if (flags & EB_WITH_ENVIRONMENT)
        put_environment(&w);
    error = collect_fds(o, flags & EB_WITHOUT_STANDARD ? 0 : found, wanted, &w);
    if (error != 0)
        return error;
    if (w.bad) /* the environment has grown since: a thread that is not Python's may change it */
        return EAGAIN;
    o->size = eb_written(&w);
    put_number(o->frame, o->size - EB_HEADER_SIZE);
    if (flags & EB_WITH_CWD) {
        o->cwd_fd = eb_above_standard(open(".", O_PATH | O_DIRECTORY | O_CLOEXEC));
        if (o->cwd_fd < 0)
            return errno;
        o->fds[o->fd_count++] = o->cwd_fd;
    }
    for (uint32_t i = 0; i < wanted->carried_count; i++)
        o->fds[o->fd_count++] = wanted->carried[i];
    return 0;
}

int eb_spawn_frame_build(struct eb_spawn_frame *o, int found, int flags, const uint8_t *options, size_t options_size,
                         const struct eb_wanted_fds *wanted)
{
    int error = EAGAIN;
    for (int i = 0; i < MOST_BUILDS && error == EAGAIN; i++)
        error = build(o, found, flags, options, options_size, wanted);
    return error;
}

void eb_spawn_frame_send(struct eb_spawn_frame *o, int fd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(EB_MOST_FDS_SENT * sizeof(int))];
    } control;
    struct iovec bytes = {.iov_base = o->frame, .iov_len = o->size};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    size_t rights = o->fd_count * sizeof(int);
    if (o->fd_count > EB_MOST_FDS_SENT)
        return;
    if (rights > 0) {
        control.header =
            (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(rights)};
        memcpy(CMSG_DATA(&control.header), o->fds, rights);
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(rights);
    }
    /* If this fails, the caller tries again in its own way, and finds out why. */
    ssize_t n = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0)
        o->sent = (size_t)n;
}

void eb_spawn_frame_done(struct eb_spawn_frame *o)
{
    if (o->cwd_fd >= 0)
        close(o->cwd_fd);
    o->cwd_fd = -1;
    if (o->capacity > KEEP) {
        free(o->frame);
        o->frame = NULL;
        o->capacity = 0;
    }
}

void eb_spawn_frame_init(struct eb_spawn_frame *o)
{
    eb_caller_init(&o->caller);
    o->cwd_fd = -1;
}

void eb_spawn_frame_clear(struct eb_spawn_frame *o)
{
    eb_spawn_frame_done(o);
    eb_caller_close(&o->caller);
    free(o->frame);
    free(o->fds);
}

struct eb_spawn_frame *eb_spawn_frame_new(void)
{
    struct eb_spawn_frame *o = calloc(1, sizeof *o);
    if (o != NULL)
        eb_spawn_frame_init(o);
    return o;
}

void eb_spawn_frame_free(struct eb_spawn_frame *o)
{
    eb_spawn_frame_clear(o);
    free(o);
}
