/* The ring file, of which common/ringfile.h is the layout, and who reads it while it is written. */
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
        uint64_t missed; /* bytes that were overwritten before they were read; the reader's to tell, and to set to 0 */
        uint64_t sequence, time_us; /* of the record there, */
        uint32_t size;              /* if this is not 0 */
    } rings[EB_RINGS];
};

/* Writes the header for rings of `capacity` bytes, one for each of the streams that has its bit (1 and 2).  False: see
 * errno. */
bool eb_ring_make(int fd, uint64_t capacity, unsigned streams);
/* The most that a record takes. */
size_t eb_ring_most(void);
/* Memory for so much, which cursors use too; NULL: memory is short. */
uint8_t *eb_ring_buffer(void);
/* Gives it back, until it is asked for again. */
void eb_ring_trim(void);

/* Adds a record of the buffer's first `size` bytes.  What finds no room is lost, and counted. */
void eb_ring_add(int stream, size_t size);
/* Bytes of a stream's output up to now, and of these the ones that are no more there. */
uint64_t eb_ring_added(int stream);
uint64_t eb_ring_lost(int stream);

/* A cursor before the first record whose sequence is not less than `first`; of what is before it, its reader knows
 * `known` bytes of each stream, and has missed the rest. */
void eb_cursor_start(struct eb_cursor *c, uint64_t first, const uint64_t known[EB_RINGS]);
/* A cursor behind all. */
void eb_cursor_end(struct eb_cursor *c);
/* The stream of the next record by the sequence; 0: there is none.  Notes what has been missed. */
int eb_cursor_next(struct eb_cursor *c);
/* The data of the next record, of `stream`, in the buffer; NULL: they can't be read, and count as missed.  Moves on. */
const uint8_t *eb_cursor_take(struct eb_cursor *c, int stream);

#endif
