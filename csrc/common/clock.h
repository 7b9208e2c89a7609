#ifndef EB_CLOCK_H
#define EB_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t eb_clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* CLOCK_MONOTONIC in milliseconds. */
static inline uint64_t eb_now_ms(void)
{
    return eb_clock_ns(CLOCK_MONOTONIC) / 1000000;
}

#endif
