/*
 * The part of a harness that runs a loop by a script: an input of which each byte is used once, a clock that only the
 * harness moves, and an epoll_wait that takes the next step of the script instead of waiting.
 */
#ifndef FUZZ_SCRIPT_H
#define FUZZ_SCRIPT_H

enum { MOST_ROUNDS = 100000 };

static const uint8_t *script, *script_end;
static unsigned rounds;
static uint64_t now_ns;

/* Defined by the harness: act() takes the next step of the script, and finish() a step towards the end of
 * everything; finish() returns false if there is none left. */
static void act(void);
static bool finish(void);

static uint8_t next(void)
{
    return script < script_end ? *script++ : 0;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *t)
{
    (void)clock;
    *t = (struct timespec){.tv_sec = (time_t)(now_ns / 1000000000), .tv_nsec = (long)(now_ns % 1000000000)};
    return 0;
}

int fuzz_epoll_wait(int fd, struct epoll_event *events, int most, int timeout)
{
    for (;;) {
        uint64_t before = now_ns;
        int got = epoll_wait(fd, events, most, 0);
        CHECK(rounds++ < MOST_ROUNDS);
        if (got != 0 || timeout == 0)
            return got;
        if (script < script_end)
            act();
        else if (!finish()) {
            CHECK(timeout > 0); /* otherwise the loop would wait for ever */
            now_ns += 1000000ull * (unsigned)timeout;
        }
        if (now_ns != before)
            return 0;
    }
}

#endif
