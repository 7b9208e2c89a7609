/*
 * Fuzzes eb_request_parse: no input may crash it, and it must understand what it accepts correctly.
 *
 *     tests/fuzz/run 600      # ten minutes, with libFuzzer; a third of them for this one
 *
 * Built with -DSTANDALONE, it takes a seed and a number of inputs, which it makes similar to valid requests.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../c/check.h"
#include "spawn/request.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static size_t check_strings(char **list, const uint8_t *data, size_t size)
{
    size_t bytes = 0;
    for (char **string = list; *string != NULL; string++) {
        CHECK((const uint8_t *)*string >= data && (const uint8_t *)*string < data + size);
        bytes += strlen(*string) + 1;
    }
    return bytes;
}

static void check_accepted(const struct eb_request *q, const uint8_t *data, size_t size)
{
    size_t bytes = 0;
    CHECK(q->executables != NULL && q->argv != NULL);
    CHECK((q->env != NULL) == eb_has(q, EB_TAG_ENV));
    bytes += check_strings(q->executables, data, size) + check_strings(q->argv, data, size);
    if (q->env != NULL)
        bytes += check_strings(q->env, data, size);
    if (q->cwd != NULL)
        bytes += strlen(q->cwd) + 1;
    if (q->root != NULL)
        bytes += strlen(q->root) + 1;
    CHECK(bytes <= size);
    CHECK(q->target_count <= EB_MAX_FDS + 3 && q->group_count <= EB_MAX_GROUPS);
    CHECK(q->affinity_size <= EB_MAX_AFFINITY);
    for (uint32_t i = 0; i < q->target_count; i++)
        CHECK(q->targets[i] >= 0 && (i == 0 || q->targets[i] > q->targets[i - 1]));
    CHECK(q->limited == 0 || eb_has(q, EB_TAG_RLIMITS) || eb_has(q, EB_TAG_SET_RLIMITS));
    CHECK((q->set_limits & ~q->limited) == 0);
    CHECK(eb_request_fds(q) <= eb_request_sources(q));
    for (uint32_t i = 0; i < eb_request_sources(q); i++)
        q->sources[i] = -1; /* checks that there is room */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct eb_request q;
    char reason[EB_MAX_REASON];
    memset(reason, 'x', sizeof reason);
    int result = eb_request_parse(&q, data, size, reason);
    if (result == 0)
        check_accepted(&q, data, size);
    else if (result < 0)
        CHECK(memchr(reason, 0, sizeof reason) != NULL && reason[0] != '\0');
    eb_request_free(&q);
    return 0;
}

static uint64_t state;

/* xorshift64*: the same numbers everywhere. */
static uint32_t below(uint32_t limit)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1d >> 32) % limit);
}

static void put_strings(struct eb_writer *w, uint8_t tag)
{
    uint32_t count = below(4);
    struct eb_writer length = *w;
    eb_put_u8(w, tag);
    eb_put_u32(w, 0);
    eb_put_u32(w, count);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t skip = below(4);
        eb_put_bytes(w, &"a=b"[skip], 4 - skip);
    }
    eb_put_u8(&length, tag);
    eb_put_u32(&length, (uint32_t)(w->at - length.at) - 4);
}

static void put_numbers(struct eb_writer *w, uint8_t tag, uint32_t size)
{
    eb_put_u8(w, tag);
    eb_put_u32(w, size);
    for (uint32_t i = 0; i < size; i++)
        eb_put_u8(w, (uint8_t)(below(32) == 0 ? below(256) : i / 4));
}

/* Makes an input similar to a valid request, because others hardly ever get past their first option. */
static size_t make(uint8_t *data, size_t size)
{
    static const uint8_t sizes[EB_TAG_END] = {
        [EB_TAG_UMASK] = 4,
        [EB_TAG_SIGMASK] = 8,
        [EB_TAG_SIGIGN] = 8,
        [EB_TAG_PGROUP] = 4,
        [EB_TAG_NICE] = 4,
        [EB_TAG_GID] = 4,
        [EB_TAG_UID] = 4,
        [EB_TAG_RENICE] = 4,
        [EB_TAG_SCHEDULER] = 8,
        [EB_TAG_IONICE] = 4,
        [EB_TAG_TIMER_SLACK] = 8,
        [EB_TAG_SIGNALS_DEFAULT] = 8,
        [EB_TAG_SIGNALS_IGNORED] = 8,
        [EB_TAG_OOM_SCORE_ADJ] = 4,
        [EB_TAG_CAPABILITIES] = 8,
        [EB_TAG_STREAMS] = 1,
        [EB_TAG_ON_CLOSE] = 4,
        [EB_TAG_NULL] = 1,
        [EB_TAG_SIGDEFAULT] = 8,
        [EB_TAG_TERMINAL] = 17,
        [EB_TAG_NAMESPACES] = 4,
        [EB_TAG_SOCKETS] = 1,
        [EB_TAG_SUPERVISE] = 5,
        [EB_TAG_LIMITS] = 28,
        [EB_TAG_QUEUE] = 5,
    };
    struct eb_writer w = eb_writer(data, size);
    for (uint8_t tag = 1; tag < EB_TAG_END; tag++) {
        if (below(tag <= EB_TAG_ARGV ? 32 : 3) == 0)
            continue;
        switch (tag) {
        case EB_TAG_EXECUTABLES:
        case EB_TAG_ARGV:
        case EB_TAG_ENV:
            put_strings(&w, tag);
            break;
        case EB_TAG_FDS:
        case EB_TAG_GROUPS:
            put_numbers(&w, tag, 4 * below(5));
            break;
        case EB_TAG_RLIMITS:
        case EB_TAG_SET_RLIMITS:
            put_numbers(&w, tag, 17 * below(4));
            break;
        case EB_TAG_AFFINITY:
            put_numbers(&w, tag, 1 + below(16));
            break;
        case EB_TAG_CWD:
        case EB_TAG_ROOT:
            eb_put_u8(&w, tag);
            eb_put_u32(&w, 2);
            eb_put_bytes(&w, "/", 2);
            break;
        default:
            put_numbers(&w, tag, sizes[tag]);
        }
    }
    for (uint32_t i = below(4); i > 0 && w.at > w.start; i--)
        data[below((uint32_t)(w.at - w.start))] = (uint8_t)(below(2) == 0 ? below(256) : below(3));
    return eb_written(&w) - (below(4) == 0 ? below((uint32_t)eb_written(&w) + 1) : 0);
}

#ifndef STANDALONE

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

/* Covers all tags, which libFuzzer would hardly find. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    state = (uint64_t)seed * 2 + 1;
    return below(8) == 0 ? make(data, most) : LLVMFuzzerMutate(data, size, most);
}

#else

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    unsigned long count = argc > 2 ? strtoul(argv[2], NULL, 0) : 1000000, accepted = 0;
    uint8_t buffer[1024];
    state = seed * 2 + 1;
    for (unsigned long i = 0; i < count; i++) {
        size_t size = make(buffer, sizeof buffer);
        /* An allocation of exactly this size, so that the sanitizer notices a read of one byte too many. */
        uint8_t *data = malloc(size == 0 ? 1 : size);
        struct eb_request q;
        char reason[EB_MAX_REASON];
        if (data == NULL)
            return 1;
        memcpy(data, buffer, size);
        LLVMFuzzerTestOneInput(data, size);
        accepted += eb_request_parse(&q, data, size, reason) == 0;
        eb_request_free(&q);
        free(data);
    }
    printf("seed %llu: %lu inputs, %lu of them good requests\n", (unsigned long long)seed, count, accepted);
    return 0;
}

#endif
