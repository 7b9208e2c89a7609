/* Bytes and descriptors over a Unix stream socket, without waiting, and without changing the socket's flags, which
 * other processes may share. */
#ifndef EB_FDPASS_H
#define EB_FDPASS_H

#include <sys/socket.h>
#include <sys/types.h>

#include "common/wire.h"

/* Descriptors that were received and are owned by this object, oldest first. */
struct eb_fds {
    int *at;
    uint32_t count, capacity;
    bool lost; /* some did not arrive: no free number, or more than EB_MAX_FDS */
};

/* Receives up to `size` bytes; the descriptors that come with them are appended to `fds`, close-on-exec. With
 * SO_PASSCRED, `sender` becomes the sender of the bytes: the kernel never joins the bytes of two senders. Without
 * it, `sender` is unchanged.  Returns as recv(2) does. */
ssize_t eb_receive(int socket, void *data, size_t size, struct eb_fds *fds, struct ucred *sender);
/* Sends two parts as send(2) sends one, never raising SIGPIPE. */
ssize_t eb_send(int socket, const void *first, size_t first_size, const void *second, size_t second_size);

/* Removes the oldest, which the caller must then close.  There must be one. */
int eb_fds_take(struct eb_fds *fds);
/* Closes the oldest `count`. */
void eb_fds_drop(struct eb_fds *fds, uint32_t count);
/* Closes all, and clears `lost`. */
void eb_fds_clear(struct eb_fds *fds);
/* How many descriptors all of these objects hold together. */
uint32_t eb_fds_held(void);

#endif
