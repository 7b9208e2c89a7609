/* The ring file, whose layout is in common/ringfile.h, and its readers while it is written. */
#ifndef EB_RING_H
#define EB_RING_H

#include "common/ringfile.h"

#include <stdbool.h>
#include <stddef.h>

/* A place in the rings, between two records of each. */
struct eb_cursor {
    struct eb_cursor_ring {
        uint64_t at;     /* position */
        uint64_t passed; /* bytes of output before it */
        uint64_t missed; /* bytes that were overwritten before they were read; the reader reports them, and sets this to
                            0 */
        uint64_t sequence, time_us; /* of the record at `at`, */
        uint32_t size;              /* if this is not 0 */
    } rings[EB_RINGS];
};

/* Writes the header for rings of `capacity` bytes, one for each of the streams that has its bit (1 and 2).  False: see
 * errno. */
bool eb_ring_make(int fd, uint64_t capacity, unsigned streams);
/* The most bytes of data that a record can have. */
size_t eb_ring_most(void);
/* Memory for that many, which cursors use too; NULL: memory is short. */
uint8_t *eb_ring_buffer(void);
/* Gives that memory back until it is needed again. */
void eb_ring_trim(void);

/* Adds a record of the buffer's first `size` bytes.  Data for which there is no room is lost, and counted. */
void eb_ring_add(int stream, size_t size);
/* Bytes of a stream's output up to now, and how many of these are no longer there. */
uint64_t eb_ring_added(int stream);
uint64_t eb_ring_lost(int stream);

/* Puts a cursor before the first record whose sequence is not less than `first`; of the output before it, the reader
 * knows `known` bytes of each stream, and has missed the rest. */
void eb_cursor_start(struct eb_cursor *c, uint64_t first, const uint64_t known[EB_RINGS]);
/* Puts a cursor behind all records. */
void eb_cursor_end(struct eb_cursor *c);
/* Returns the stream of the next record by the sequence; 0: there is none.  Counts what has been missed. */
int eb_cursor_next(struct eb_cursor *c);
/* Reads the data of the next record, of `stream`, into the buffer, and moves on.  NULL: the data can't be read, and
 * count as missed. */
const uint8_t *eb_cursor_take(struct eb_cursor *c, int stream);

#endif
