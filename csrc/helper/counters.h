/*
 * The counts of a daemon's helper, for its REPORT.  These functions do nothing if no counts are kept, as in a private
 * helper.
 */
#ifndef EB_COUNTERS_H
#define EB_COUNTERS_H

#include "common/wire.h"

#include <sys/types.h>

/* Keeps the counts in a file of the server, which can read them even if this process is killed; with -1, in memory
 * of this process.  False: see errno. */
bool eb_counters_keep(int fd);
bool eb_counters_are_kept(void);
/* Returns the number of starts, including this one. */
uint64_t eb_count_start(void);
/* Counts the duration of a start. */
void eb_count_time(uint64_t microseconds);
void eb_count_failure(enum eb_stage stage, int error);
void eb_count_end(void);

/* Notes a command that ends with its connection, so that the server ends it if this process is killed.  Returns its
 * place, for eb_tied_forget, or 0 if there is none. */
uint32_t eb_tied_keep(pid_t pid, uint32_t grace_ms);
void eb_tied_forget(uint32_t slot);

/* The REPORT up to the live commands, and its size. */
size_t eb_counters_size(void);
void eb_counters_put(struct eb_writer *w, uint32_t connections);

#endif
