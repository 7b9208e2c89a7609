#include "helper/counters.h"

#include <sys/mman.h>

enum {
    MOST_FAILURES = 64, /* kinds of failure that are counted separately */
    BUCKETS = 96,       /* of start times: up to 2^24 microseconds */
    MOST_TIED = 7900,   /* 64 KiB in all */
};

/* The server reads this layout, see docs/protocol.md. */
static struct counters {
    uint64_t started, ended;
    uint64_t failure_kinds;
    uint64_t buckets[BUCKETS];
    struct {
        uint32_t stage;
        int32_t error;
        uint64_t count;
    } failures[MOST_FAILURES];
    struct {
        int32_t pid; /* 0 or less: none; then it is the negated number of the next free entry, counted from 1 */
        uint32_t grace_ms;
    } tied[MOST_TIED];
} *counters; /* NULL: no counts are kept */

bool eb_counters_keep(int fd)
{
    const int flags = MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0);
    void *kept = mmap(NULL, sizeof *counters, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (kept == MAP_FAILED)
        return false;
    counters = kept;
    return true;
}

/* The lowest entries are used first, so that few pages of the file are in use. */
static uint32_t tied_count, first_free;

uint32_t eb_tied_keep(pid_t pid, uint32_t grace_ms)
{
    uint32_t slot = first_free;
    if (counters == NULL || (slot == 0 && tied_count == MOST_TIED))
        return 0;
    if (slot != 0)
        first_free = (uint32_t)-counters->tied[slot - 1].pid;
    else
        slot = ++tied_count;
    counters->tied[slot - 1].grace_ms = grace_ms;
    counters->tied[slot - 1].pid = pid;
    return slot;
}

void eb_tied_forget(uint32_t slot)
{
    if (slot == 0)
        return;
    counters->tied[slot - 1].pid = -(int32_t)first_free;
    first_free = slot;
}

bool eb_counters_are_kept(void)
{
    return counters != NULL;
}

/* The least i for which `microseconds` is less than 2^(i/4). */
static unsigned bucket(uint64_t microseconds)
{
    static const unsigned quarters[] = {11892, 14142, 16818}; /* 10^4 * 2^(1/4), and so on */
    uint64_t us = microseconds > 0 ? microseconds : 1;
    unsigned power = 63 - (unsigned)__builtin_clzll(us), i = 0;
    if (power >= BUCKETS / 4)
        return BUCKETS - 1;
    while (i < 3 && us * 10000 >= (uint64_t)quarters[i] << power)
        i++;
    i += 4 * power + 1;
    return i < BUCKETS ? i : BUCKETS - 1;
}

void eb_count_time(uint64_t microseconds)
{
    if (counters != NULL)
        counters->buckets[bucket(microseconds)]++;
}

uint64_t eb_count_start(void)
{
    return counters != NULL ? ++counters->started : 0;
}

void eb_count_failure(enum eb_stage stage, int error)
{
    uint32_t i = 0;
    if (counters == NULL)
        return;
    while (i < counters->failure_kinds &&
           (counters->failures[i].stage != (uint32_t)stage || counters->failures[i].error != error))
        i++;
    if (i == MOST_FAILURES)
        i = MOST_FAILURES - 1; /* all other kinds together */
    if (i == counters->failure_kinds) {
        counters->failures[i].stage = (uint32_t)stage;
        counters->failures[i].error = error;
        counters->failure_kinds++;
    }
    counters->failures[i].count++;
}

void eb_count_end(void)
{
    if (counters != NULL)
        counters->ended++;
}

size_t eb_counters_size(void)
{
    return 8 + 8 + 4 + 4 + (size_t)counters->failure_kinds * 13 + 4 + BUCKETS * 8;
}

void eb_counters_put(struct eb_writer *w, uint32_t connections)
{
    eb_put_u64(w, counters->started);
    eb_put_u64(w, counters->ended);
    eb_put_u32(w, connections);
    eb_put_u32(w, (uint32_t)counters->failure_kinds);
    for (uint32_t i = 0; i < counters->failure_kinds; i++) {
        eb_put_u8(w, (uint8_t)counters->failures[i].stage);
        eb_put_u32(w, (uint32_t)counters->failures[i].error);
        eb_put_u64(w, counters->failures[i].count);
    }
    eb_put_u32(w, BUCKETS);
    for (uint32_t i = 0; i < BUCKETS; i++)
        eb_put_u64(w, counters->buckets[i]);
}
