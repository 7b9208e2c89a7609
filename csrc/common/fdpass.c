#include "common/fdpass.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t held;

static bool reserve(struct eb_fds *fds, uint32_t more)
{
    if (more > EB_MAX_FDS - fds->count)
        return false;
    uint32_t needed = fds->count + more;
    if (needed <= fds->capacity)
        return true;
    uint32_t capacity = needed + needed / 2;
    int *at = realloc(fds->at, capacity * sizeof *at);
    if (at == NULL)
        return false;
    fds->at = at;
    fds->capacity = capacity;
    return true;
}

static void take(struct eb_fds *fds, const uint8_t *data, size_t size)
{
    uint32_t count = (uint32_t)(size / sizeof(int));
    bool kept = !fds->lost && reserve(fds, count);
    held += kept ? count : 0;
    for (uint32_t i = 0; i < count; i++) {
        int fd;
        memcpy(&fd, data + i * sizeof fd, sizeof fd);
        if (kept)
            fds->at[fds->count++] = fd;
        else
            close(fd);
    }
    fds->lost = fds->lost || !kept;
}

ssize_t eb_receive(int socket, void *data, size_t size, struct eb_fds *fds, struct ucred *sender)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(EB_MAX_FDS_PER_SEND * sizeof(int))];
    } control;
    struct iovec bytes = {.iov_base = data, .iov_len = size};
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n;
    do
        n = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return n;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            take(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
        else if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_CREDENTIALS)
            memcpy(sender, CMSG_DATA(c), sizeof *sender);
    /* The kernel installs as many descriptors as it has numbers for, and drops the rest. */
    if (message.msg_flags & MSG_CTRUNC)
        fds->lost = true;
    return n;
}

ssize_t eb_send(int socket, const void *first, size_t first_size, const void *second, size_t second_size)
{
    /* sendmsg's prototype lacks a const. */
    struct iovec parts[] = {{.iov_base = (void *)(uintptr_t)first, .iov_len = first_size},
                            {.iov_base = (void *)(uintptr_t)second, .iov_len = second_size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = second_size > 0 ? 2 : 1};
    ssize_t n;
    do
        n = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n;
}

static void forget(struct eb_fds *fds, uint32_t count)
{
    held -= count;
    fds->count -= count;
    if (count > 0 && fds->count > 0)
        memmove(fds->at, fds->at + count, fds->count * sizeof *fds->at);
}

int eb_fds_take(struct eb_fds *fds)
{
    int fd = fds->at[0];
    forget(fds, 1);
    return fd;
}

void eb_fds_drop(struct eb_fds *fds, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        close(fds->at[i]);
    forget(fds, count);
}

void eb_fds_clear(struct eb_fds *fds)
{
    eb_fds_drop(fds, fds->count);
    free(fds->at);
    *fds = (struct eb_fds){0};
}

uint32_t eb_fds_held(void)
{
    return held;
}
