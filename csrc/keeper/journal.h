/* The journal of a job: lines of JSON, the first of which is the server's. */
#ifndef EB_JOURNAL_H
#define EB_JOURNAL_H

#include <stdbool.h>

/* Of a file that is open for appending. */
void eb_journal_use(int fd);
/* Has room for all that will be added, for the end must not be lost because others have filled the disk.  False: see
 * errno. */
bool eb_journal_reserve(void);
/* Appends a line by one write; where there is no room, it is missing. */
__attribute__((format(printf, 1, 2))) void eb_journal_add(const char *format, ...);

#endif
