/* A job's journal: lines of JSON, the first of which the server has written. */
#ifndef EB_JOURNAL_H
#define EB_JOURNAL_H

#include <stdbool.h>

/* Uses a file that is open for appending. */
void eb_journal_use(int fd);
/* Reserves room for all that will be added, so that the end is not lost when others fill the disk.  False: see
 * errno. */
bool eb_journal_reserve(void);
/* Appends a line.  False: see errno. */
__attribute__((format(printf, 1, 2))) bool eb_journal_add(const char *format, ...);

#endif
