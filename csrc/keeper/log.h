/* The file that gets all of a job's output, in addition to the rings; it is rotated by size. */
#ifndef EB_LOG_H
#define EB_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Parses --log, --log-size or --log-count; false if the argument is another one. */
bool eb_log_option(const char *argument);
/* Opens the file, if there is to be one.  False: see errno. */
bool eb_log_open(void);
/* Appends to the file.  Returns an errno if this fails for another reason than last time, else 0. */
int eb_log_add(const uint8_t *data, size_t size);
/* How many bytes the file lacks; NULL if there is no log. */
const uint64_t *eb_log_lost(void);

#endif
