/* Functions of errand_boy._native in addition to those of the other headers. */
#ifndef EB_MODULE_H
#define EB_MODULE_H

#include "caller/spawn_frame.h"

/*
 * Reads the calling thread's state; if the helper that `start` belongs to fits it, or without one, builds the request;
 * and if `fd` still is a connection to it, sends that.  One call, since each call releases the GIL and waits for it.
 * Returns what was found, or -errno.
 */
int eb_send_request(struct eb_spawn_frame *o, const struct eb_caller *start, int helper, int flags, int fd,
                    uint64_t device, uint64_t inode, const uint8_t *options, size_t options_size, int in, int out,
                    int err, const int *others, uint32_t other_count, const int *carried, uint32_t carried_count);

/* Waits until `fd` is readable or a signal comes, by poll(2).  A blocking recv(2) on a Unix socket would also be woken
 * when the other side reads what has been sent to it. */
int eb_await_readable(int fd);

/* Closes descriptors that strangers have sent or connected.  Each close may sleep until a signal comes.  Those that are
 * `unread` are read first, since the peer would get ECONNRESET in place of our last frames. */
void eb_close_all(const int *fds, const uint8_t *unread, size_t count);

#endif
