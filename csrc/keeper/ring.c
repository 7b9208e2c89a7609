#include "keeper/ring.h"

#include "common/wire.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(struct eb_ring_header) <= EB_RING_HEADER, "the header has a page");

static int file;
static struct eb_ring_header header;
static uint64_t added[EB_RINGS]; /* bytes of output so far */
static uint64_t sequence;        /* of the last record */
static size_t most;
static uint8_t *buffer; /* NULL while there is none */

/* The newest record, while the buffer has its data: most readers want this one. */
static struct {
    const struct eb_ring_state *ring; /* NULL: there is no such record */
    uint64_t at, time_us;
    uint32_t size;
} newest;

static struct eb_ring_state *ring_of(int stream)
{
    return &header.rings[stream - 1];
}

/* -- the file -- */

static bool write_all(const void *data, size_t size, uint64_t offset)
{
    ssize_t n;
    do
        n = pwrite(file, data, size, (off_t)offset);
    while (n < 0 && errno == EINTR);
    if (n >= 0 && (size_t)n < size)
        errno = ENOSPC;
    return n == (ssize_t)size;
}

static bool put(const struct eb_ring_state *r, uint64_t at, const uint8_t *data, size_t size)
{
    uint64_t place = at % r->capacity;
    size_t first = size < r->capacity - place ? size : (size_t)(r->capacity - place);
    return write_all(data, first, r->offset + place) &&
           (first == size || write_all(data + first, size - first, r->offset));
}

static bool get(const struct eb_ring_state *r, uint64_t at, uint8_t *data, size_t size)
{
    uint64_t place = at % r->capacity;
    size_t first = size < r->capacity - place ? size : (size_t)(r->capacity - place);
    return pread(file, data, first, (off_t)(r->offset + place)) == (ssize_t)first &&
           (first == size || pread(file, data + first, size - first, (off_t)r->offset) == (ssize_t)(size - first));
}

/* The header's page has existed since the file was made, so this can't fail for lack of room, and no kill cuts it
 * short. */
static void put_state(const struct eb_ring_state *r)
{
    (void)write_all(r, sizeof *r, (uint64_t)((const char *)r - (const char *)&header));
}

static bool put_record(const struct eb_ring_state *r, const uint8_t *head, size_t size)
{
    const uint64_t place = r->head % r->capacity;
    if (place + EB_RING_RECORD + size > r->capacity)
        return put(r, r->head, head, EB_RING_RECORD) && put(r, r->head + EB_RING_RECORD, buffer, size);
    struct iovec parts[] = {{(void *)(uintptr_t)head, EB_RING_RECORD}, {buffer, size}};
    ssize_t n;
    do
        n = pwritev(file, parts, 2, (off_t)(r->offset + place));
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)(EB_RING_RECORD + size);
}

/* Returns the size of the record at `at`; 0 if there is no valid one, because somebody else has written there. */
static uint32_t get_head(const struct eb_ring_state *r, uint64_t at, uint64_t *number, uint64_t *time_us)
{
    uint8_t head[EB_RING_RECORD];
    if (!get(r, at, head, sizeof head))
        return 0;
    uint32_t size;
    memcpy(number, head, 8);
    memcpy(time_us, head + 8, 8);
    memcpy(&size, head + 16, 4);
    return size <= most && at + EB_RING_RECORD + size <= r->head ? size : 0;
}

bool eb_ring_make(int fd, uint64_t capacity, unsigned streams)
{
    file = fd;
    header = (struct eb_ring_header){.size = EB_RING_HEADER, .count = EB_RINGS};
    memset(added, 0, sizeof added);
    sequence = 0;
    memcpy(header.magic, EB_RING_MAGIC, sizeof header.magic);
    uint64_t offset = EB_RING_HEADER;
    for (int i = 0; i < EB_RINGS; i++)
        if (streams >> (i + 1) & 1) {
            header.rings[i] = (struct eb_ring_state){.offset = offset, .capacity = capacity};
            offset += capacity;
        }
    most = capacity / 4 < EB_MAX_OUTPUT ? (size_t)(capacity / 4) : EB_MAX_OUTPUT;
    return write_all(&header, sizeof header, 0);
}

size_t eb_ring_most(void)
{
    return most;
}

uint8_t *eb_ring_buffer(void)
{
    newest.ring = NULL;
    if (buffer == NULL) {
        void *made = mmap(NULL, EB_MAX_OUTPUT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        buffer = made != MAP_FAILED ? made : NULL;
    }
    return buffer;
}

void eb_ring_trim(void)
{
    newest.ring = NULL;
    if (buffer != NULL)
        munmap(buffer, EB_MAX_OUTPUT);
    buffer = NULL;
}

/* -- adding records -- */

/* Empties a ring.  The next record begins at the start of the ring, where the file most likely has pages. */
static void lose_all(struct eb_ring_state *r, uint64_t before)
{
    r->head = r->tail = (r->head + r->capacity - 1) / r->capacity * r->capacity;
    r->lost = before;
    put_state(r);
}

static void make_room(struct eb_ring_state *r, size_t needed, uint64_t before)
{
    const uint64_t tail = r->tail;
    while (r->head - r->tail + needed > r->capacity) {
        uint64_t number, time_us;
        uint32_t size = get_head(r, r->tail, &number, &time_us);
        if (size == 0) {
            lose_all(r, before);
            return;
        }
        r->tail += EB_RING_RECORD + size;
        r->lost += size;
    }
    if (r->tail != tail)
        put_state(r);
}

void eb_ring_add(int stream, size_t size)
{
    struct eb_ring_state *r = ring_of(stream);
    const uint32_t length = (uint32_t)size;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const uint64_t time_us = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
    const uint64_t before = added[stream - 1];
    uint8_t head[EB_RING_RECORD];
    sequence++;
    added[stream - 1] += size;
    memcpy(head, &sequence, 8);
    memcpy(head + 8, &time_us, 8);
    memcpy(head + 16, &length, 4);
    make_room(r, sizeof head + size, before);
    newest.ring = NULL;
    if (!put_record(r, head, size)) {
        lose_all(r, before);
        if (!put_record(r, head, size)) {
            lose_all(r, before + size);
            return;
        }
    }
    newest.ring = r;
    newest.at = r->head;
    newest.time_us = time_us;
    newest.size = length;
    r->head += sizeof head + size;
    put_state(r);
}

uint64_t eb_ring_added(int stream)
{
    return added[stream - 1];
}

uint64_t eb_ring_lost(int stream)
{
    return ring_of(stream)->lost;
}

/* -- cursors -- */

/* Moves the cursor to a record that exists, and reads its head.  False: there is none. */
static bool settle(struct eb_cursor_ring *c, const struct eb_ring_state *r)
{
    if (c->at < r->tail || c->passed < r->lost) {
        c->missed += r->lost - c->passed;
        c->passed = r->lost;
        c->at = r->tail;
        c->size = 0;
    }
    if (c->at == r->head)
        return false;
    if (c->size != 0)
        return true;
    if (newest.ring == r && newest.at == c->at) {
        c->sequence = sequence;
        c->time_us = newest.time_us;
        c->size = newest.size;
    } else if ((c->size = get_head(r, c->at, &c->sequence, &c->time_us)) == 0) {
        c->missed += added[r - header.rings] - c->passed;
        c->passed = added[r - header.rings];
        c->at = r->head;
        return false;
    }
    return true;
}

static void move_on(struct eb_cursor_ring *c)
{
    c->at += EB_RING_RECORD + c->size;
    c->passed += c->size;
    c->size = 0;
}

void eb_cursor_end(struct eb_cursor *c)
{
    for (int i = 0; i < EB_RINGS; i++)
        c->rings[i] = (struct eb_cursor_ring){.at = header.rings[i].head, .passed = added[i]};
}

void eb_cursor_start(struct eb_cursor *c, uint64_t first, const uint64_t known[EB_RINGS])
{
    for (int i = 0; i < EB_RINGS; i++) {
        const struct eb_ring_state *r = &header.rings[i];
        struct eb_cursor_ring *at = &c->rings[i];
        *at = (struct eb_cursor_ring){.at = r->tail, .passed = r->lost};
        while (settle(at, r) && at->sequence < first)
            move_on(at);
        at->missed = at->passed > known[i] ? at->passed - known[i] : 0;
    }
}

int eb_cursor_next(struct eb_cursor *c)
{
    int stream = 0;
    for (int i = 0; i < EB_RINGS; i++)
        if (settle(&c->rings[i], &header.rings[i]) &&
            (stream == 0 || c->rings[i].sequence < c->rings[stream - 1].sequence))
            stream = i + 1;
    return stream;
}

const uint8_t *eb_cursor_take(struct eb_cursor *c, int stream)
{
    struct eb_cursor_ring *at = &c->rings[stream - 1];
    const struct eb_ring_state *r = ring_of(stream);
    bool got = newest.ring == r && newest.at == at->at;
    if (!got)
        got = eb_ring_buffer() != NULL && get(r, at->at + EB_RING_RECORD, buffer, at->size);
    if (!got)
        at->missed += at->size;
    move_on(at);
    return got ? buffer : NULL;
}
