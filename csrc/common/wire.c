#include "common/wire.h"

#include <string.h>

struct eb_reader eb_reader(const void *data, size_t size)
{
    const uint8_t *start = data;
    return (struct eb_reader){.at = start, .end = start + size};
}

size_t eb_remaining(const struct eb_reader *r)
{
    return (size_t)(r->end - r->at);
}

const uint8_t *eb_get_bytes(struct eb_reader *r, size_t size)
{
    if (r->bad || size > eb_remaining(r)) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *bytes = r->at;
    r->at += size;
    return bytes;
}

static uint64_t get(struct eb_reader *r, size_t size)
{
    const uint8_t *bytes = eb_get_bytes(r, size);
    uint64_t value = 0;
    if (bytes != NULL)
        for (size_t i = 0; i < size; i++)
            value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

uint8_t eb_get_u8(struct eb_reader *r)
{
    return (uint8_t)get(r, 1);
}

uint32_t eb_get_u32(struct eb_reader *r)
{
    return (uint32_t)get(r, 4);
}

uint64_t eb_get_u64(struct eb_reader *r)
{
    return get(r, 8);
}

struct eb_writer eb_writer(void *data, size_t size)
{
    uint8_t *start = data;
    return (struct eb_writer){.start = start, .at = start, .end = start + size};
}

size_t eb_written(const struct eb_writer *w)
{
    return (size_t)(w->at - w->start);
}

void eb_put_bytes(struct eb_writer *w, const void *data, size_t size)
{
    if (w->bad || size > (size_t)(w->end - w->at)) {
        w->bad = true;
        return;
    }
    if (size > 0)
        memcpy(w->at, data, size);
    w->at += size;
}

static void put(struct eb_writer *w, uint64_t value, size_t size)
{
    uint8_t bytes[8];
    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(value >> (8 * i));
    eb_put_bytes(w, bytes, size);
}

void eb_put_u8(struct eb_writer *w, uint8_t value)
{
    put(w, value, 1);
}

void eb_put_u32(struct eb_writer *w, uint32_t value)
{
    put(w, value, 4);
}

void eb_put_u64(struct eb_writer *w, uint64_t value)
{
    put(w, value, 8);
}
