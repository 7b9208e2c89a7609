/* The file to which all of a job's output goes, beside the rings; by its size it is rotated. */
#ifndef EB_LOG_H
#define EB_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Takes --log, --log-size or --log-count; false: it is none of them. */
bool eb_log_option(const char *argument);
/* Opens it, if there is to be one.  False: see errno. */
bool eb_log_open(void);
/* Appends to it.  Returns an errno if it now fails for another reason than before, else 0. */
int eb_log_add(const uint8_t *data, size_t size);
/* Bytes that it lacks; NULL: there is no log. */
const uint64_t *eb_log_lost(void);

#endif
