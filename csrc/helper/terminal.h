/* The pseudoterminal of a streamed command. */
#ifndef EB_TERMINAL_H
#define EB_TERMINAL_H

#include "spawn/request.h"

enum { EB_MOST_KEYS = 2 };

/* Opens one.  Two descriptors of either side are for the streams 0 and 1; those not opened are left.  False: see
 * errno. */
bool eb_terminal_open(const struct eb_request *q, int ours[2], int theirs[2]);
/* Sets the size, as WINSIZE has it. */
void eb_terminal_resize(int fd, const uint8_t *payload, size_t size);
/* Writes the keys that end the input, whose last byte is `last`, and returns how many there are: none if that has no
 * meaning. */
uint32_t eb_terminal_end(int fd, uint8_t last, uint8_t keys[EB_MOST_KEYS]);

#endif
