/* Functions of errand_boy._native in addition to those of the other headers. */
#ifndef EB_MODULE_H
#define EB_MODULE_H

#include "caller/spawn_frame.h"

/*
 * Reads the calling thread's state; builds the request if there is no helper, or if the helper that `start` belongs to
 * fits that state; and sends it if `fd` still is a connection to the helper.  This is one call, because each call
 * releases the GIL and waits to get it back.  Returns what was found, or -errno.
 */
int eb_send_request(struct eb_spawn_frame *o, const struct eb_caller *start, int helper, int flags, int fd,
                    uint64_t device, uint64_t inode, const uint8_t *options, size_t options_size, int in, int out,
                    int err, const int *others, uint32_t other_count, const int *carried, uint32_t carried_count);

/* Waits until `fd` is readable or a signal comes, by poll(2).  A blocking recv(2) on a Unix socket would also wake
 * up when the other side reads what it has been sent. */
int eb_await_readable(int fd);

/* Closes descriptors that strangers have sent or connected.  Each close may sleep until a signal comes.  Those that
 * are `unread` are read first, because otherwise the peer would get ECONNRESET instead of our last frames. */
void eb_close_all(const int *fds, const uint8_t *unread, size_t count);

#endif
