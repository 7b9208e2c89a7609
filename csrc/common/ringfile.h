/*
 * The file in which a job's keeper keeps output: a header of one page, then a ring for each stream.  Numbers are
 * in the machine's byte order.
 *
 * Positions are counts of bytes that only grow: position p lies at offset + p % capacity.  The records between tail and
 * head are whole, whenever the keeper is killed: the tail moves before an old record is overwritten, the head after the
 * new one has been written.  A record may wrap around.  All records share one count, `sequence`, which gives their
 * order across the rings.
 */
#ifndef EB_RINGFILE_H
#define EB_RINGFILE_H

#include <stdint.h>

enum {
    EB_RING_HEADER = 4096, /* bytes */
    EB_RINGS = 2,          /* stream 1, standard output, and 2, standard error */
    EB_RING_RECORD = 20,   /* bytes before a record's data */
};

#define EB_RING_MAGIC "EBRING1" /* with its NUL */

struct eb_ring_header {
    char magic[8];
    uint32_t size;  /* EB_RING_HEADER */
    uint32_t count; /* EB_RINGS */
    struct eb_ring_state {
        uint64_t offset, capacity; /* 0: no such stream */
        uint64_t head, tail;       /* positions */
        uint64_t lost;             /* bytes of output before the tail, which are no longer there */
    } rings[EB_RINGS];
};

/* Before a record's data: u64 sequence, from 1 on | u64 microseconds since 1970 | u32 length of the data. */

#endif
