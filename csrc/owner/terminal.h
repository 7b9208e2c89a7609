/* The pseudoterminal of a streamed command. */
#ifndef EB_TERMINAL_H
#define EB_TERMINAL_H

#include "spawn/request.h"

enum { EB_MOST_KEYS = 2 };

/* Opens a terminal, with two descriptors of each side for the streams 0 and 1; leaves those that it can't open
 * unchanged. False: see errno. */
bool eb_terminal_open(const struct eb_request *q, int ours[2], int theirs[2]);
/* Sets the size to a WINSIZE. */
void eb_terminal_resize(int fd, const uint8_t *payload, size_t size);
/* Stores the keys that end the input, whose last byte is `last`, and returns their number: 0 if no keys end it. */
uint32_t eb_terminal_end(int fd, uint8_t last, uint8_t keys[EB_MOST_KEYS]);

#endif
