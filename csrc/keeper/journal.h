/* The journal of a job: lines of JSON, the first of which is the server's. */
#ifndef EB_JOURNAL_H
#define EB_JOURNAL_H

/* Of a file that is open for appending. */
void eb_journal_use(int fd);
/* Appends a line by one write; where there is no room, it is missing. */
__attribute__((format(printf, 1, 2))) void eb_journal_add(const char *format, ...);

#endif
