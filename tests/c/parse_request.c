/*
 * Shows how C understands a SPAWN payload, for tests/test_wire.py.  The payload comes from standard input.
 *
 *   parse_request           prints each option in a line, or "error N", or "refused: WHY"
 *   parse_request truncate  parses each shorter payload; prints how many gave each kind of answer
 *   parse_request corrupt   the same with each byte replaced by each other value
 *   parse_request bounds    tests the reader and the writer
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "spawn/request.h"

static void print_hex(const void *data, size_t size)
{
    const uint8_t *bytes = data;
    for (size_t i = 0; i < size; i++)
        printf("%02x", bytes[i]);
}

static void print_strings(const char *name, char **list)
{
    printf("%s", name);
    for (char **string = list; *string != NULL; string++) {
        putchar(' ');
        putchar('.'); /* so that an empty string can be seen */
        print_hex(*string, strlen(*string));
    }
    putchar('\n');
}

static void print_limits(const struct eb_request *q, uint16_t which)
{
    for (int i = 0; i < EB_MAX_RLIMITS; i++)
        if (which >> i & 1)
            printf(" %d:%llu:%llu", i, (unsigned long long)q->rlimits[i].rlim_cur,
                   (unsigned long long)q->rlimits[i].rlim_max);
    putchar('\n');
}

static void print_request(const struct eb_request *q)
{
    print_strings("EXECUTABLES", q->executables);
    print_strings("ARGV", q->argv);
    if (eb_has(q, EB_TAG_ENV))
        print_strings("ENV", q->env);
    if (eb_has(q, EB_TAG_FDS)) {
        printf("FDS");
        for (uint32_t i = 0; i < q->target_count; i++)
            if (!eb_is_made(q, q->targets[i]))
                printf(" %d", q->targets[i]);
        putchar('\n');
    }
    if (eb_has(q, EB_TAG_CWD_FD))
        printf("CWD_FD\n");
    printf("descriptors %u\n", (unsigned)eb_request_fds(q));
    if (eb_has(q, EB_TAG_CWD)) {
        printf("CWD ");
        print_hex(q->cwd, strlen(q->cwd));
        putchar('\n');
    }
    if (eb_has(q, EB_TAG_UMASK))
        printf("UMASK %u\n", (unsigned)q->umask);
    if (eb_has(q, EB_TAG_SIGMASK))
        printf("SIGMASK %llu\n", (unsigned long long)q->sigmask);
    if (eb_has(q, EB_TAG_SIGDEFAULT))
        printf("SIGDEFAULT %llu\n", (unsigned long long)q->sigdefault);
    if (eb_has(q, EB_TAG_SIGIGN))
        printf("SIGIGN %llu\n", (unsigned long long)q->sigign);
    if (eb_has(q, EB_TAG_SETSID))
        printf("SETSID\n");
    if (eb_has(q, EB_TAG_PGROUP))
        printf("PGROUP %d\n", (int)q->pgroup);
    if (eb_has(q, EB_TAG_RLIMITS)) {
        printf("RLIMITS");
        print_limits(q, (uint16_t)(q->limited & ~q->set_limits));
    }
    if (eb_has(q, EB_TAG_SET_RLIMITS)) {
        printf("SET_RLIMITS");
        print_limits(q, q->set_limits);
    }
    if (eb_has(q, EB_TAG_CONTROLLING_TERMINAL))
        printf("CONTROLLING_TERMINAL\n");
    if (eb_has(q, EB_TAG_FOREGROUND))
        printf("FOREGROUND\n");
    if (eb_has(q, EB_TAG_RENICE))
        printf("RENICE %d\n", q->renice);
    if (eb_has(q, EB_TAG_SCHEDULER))
        printf("SCHEDULER %u %u\n", (unsigned)q->policy, (unsigned)q->priority);
    if (eb_has(q, EB_TAG_IONICE))
        printf("IONICE %u\n", (unsigned)q->ionice);
    if (eb_has(q, EB_TAG_LIMITS))
        printf("LIMITS %llu %llu %llu %u\n", (unsigned long long)q->limits.wall_us,
               (unsigned long long)q->limits.cpu_us, (unsigned long long)q->limits.memory,
               (unsigned)q->limits.processes);
    if (eb_has(q, EB_TAG_QUEUE))
        printf("QUEUE %u %d\n", (unsigned)q->queue, q->places);
    if (eb_has(q, EB_TAG_SUPERVISE))
        printf("SUPERVISE %d %u\n", q->tree_all, (unsigned)q->drain_ms);
    if (eb_has(q, EB_TAG_TIMER_SLACK))
        printf("TIMER_SLACK %llu\n", (unsigned long long)q->timer_slack);
    if (eb_has(q, EB_TAG_SIGNALS_DEFAULT))
        printf("SIGNALS_DEFAULT %llu\n", (unsigned long long)q->sigdefault);
    if (eb_has(q, EB_TAG_SIGNALS_IGNORED))
        printf("SIGNALS_IGNORED %llu\n", (unsigned long long)q->sigign);
    if (eb_has(q, EB_TAG_OOM_SCORE_ADJ))
        printf("OOM_SCORE_ADJ %d\n", q->oom_score_adj);
    if (eb_has(q, EB_TAG_ROOT)) {
        printf("ROOT ");
        print_hex(q->root, strlen(q->root));
        putchar('\n');
    }
    if (eb_has(q, EB_TAG_CAPABILITIES))
        printf("CAPABILITIES %llu\n", (unsigned long long)q->capabilities);
    if (eb_has(q, EB_TAG_NICE))
        printf("NICE %d\n", q->nice);
    if (eb_has(q, EB_TAG_AFFINITY)) {
        printf("AFFINITY ");
        print_hex(q->affinity, q->affinity_size);
        putchar('\n');
    }
    if (eb_has(q, EB_TAG_GROUPS)) {
        printf("GROUPS");
        for (uint32_t i = 0; i < q->group_count; i++)
            printf(" %u", (unsigned)q->groups[i]);
        putchar('\n');
    }
    if (eb_has(q, EB_TAG_GID))
        printf("GID %u\n", (unsigned)q->gid);
    if (eb_has(q, EB_TAG_UID))
        printf("UID %u\n", (unsigned)q->uid);
    if (eb_has(q, EB_TAG_STREAMS))
        printf("STREAMS %u\n", (unsigned)q->streams);
    if (eb_has(q, EB_TAG_NULL))
        printf("NULL %u\n", (unsigned)q->nulls);
    if (eb_has(q, EB_TAG_TERMINAL))
        printf("TERMINAL %u %u %u %u %u\n", (unsigned)q->size.ws_row, (unsigned)q->size.ws_col,
               (unsigned)q->size.ws_xpixel, (unsigned)q->size.ws_ypixel, (unsigned)q->terminal);
    if (eb_has(q, EB_TAG_COALESCE))
        printf("COALESCE\n");
    if (eb_has(q, EB_TAG_NO_NEW_PRIVS))
        printf("NO_NEW_PRIVS\n");
    if (eb_has(q, EB_TAG_CGROUP))
        printf("CGROUP\n");
    if (eb_has(q, EB_TAG_NAMESPACES))
        printf("NAMESPACES %u\n", (unsigned)q->namespaces);
    if (eb_has(q, EB_TAG_SANDBOX))
        printf("SANDBOX\n");
    if (eb_has(q, EB_TAG_SOCKETS))
        printf("SOCKETS %u\n", (unsigned)q->sockets);
    if (eb_has(q, EB_TAG_ON_CLOSE))
        printf("ON_CLOSE %u\n", (unsigned)q->on_close_ms);
}

/* Parses from an allocation of exactly this size, so that a sanitizer notices a read of one byte too many. */
static int parse(const uint8_t *data, size_t size, bool print)
{
    struct eb_request q;
    char reason[EB_MAX_REASON];
    uint8_t *copy = malloc(size);
    CHECK(copy != NULL || size == 0);
    if (size > 0)
        memcpy(copy, data, size);
    int result = eb_request_parse(&q, copy, size, reason);
    if (result < 0)
        CHECK(memchr(reason, 0, sizeof reason) != NULL);
    if (print && result == 0)
        print_request(&q);
    else if (print && result > 0)
        printf("error %d\n", result);
    else if (print)
        printf("refused: %s\n", reason);
    eb_request_free(&q);
    free(copy);
    return result;
}

static void truncate_payload(const uint8_t *data, size_t size)
{
    unsigned long counts[3] = {0};
    for (size_t i = 0; i < size; i++) {
        int result = parse(data, i, false);
        counts[result == 0 ? 0 : result > 0 ? 1 : 2]++;
    }
    printf("%lu %lu %lu\n", counts[0], counts[1], counts[2]);
}

static void corrupt_payload(uint8_t *data, size_t size)
{
    unsigned long counts[3] = {0};
    for (size_t i = 0; i < size; i++) {
        uint8_t good = data[i];
        for (int change = 1; change < 256; change++) {
            data[i] = (uint8_t)(good ^ change);
            int result = parse(data, size, false);
            counts[result == 0 ? 0 : result > 0 ? 1 : 2]++;
        }
        data[i] = good;
    }
    printf("%lu %lu %lu\n", counts[0], counts[1], counts[2]);
}

static void check_bounds(void)
{
    for (size_t size = 0; size <= 16; size++) {
        uint8_t *data = malloc(size + 1);
        CHECK(data != NULL);
        memset(data, 0xee, size + 1);

        struct eb_writer w = eb_writer(data, size);
        eb_put_u64(&w, 0x0102030405060708);
        CHECK(w.bad == (size < 8) && eb_written(&w) == (size < 8 ? 0 : 8));
        eb_put_u32(&w, 0x090a0b0c);
        CHECK(w.bad == (size < 12)); /* once bad, it stays bad, even if this value would fit */
        eb_put_u8(&w, 1);
        eb_put_bytes(&w, NULL, 0);
        CHECK(w.bad == (size < 13) && eb_written(&w) == (size < 8 ? 0 : size < 12 ? 8 : size < 13 ? 12 : 13));
        CHECK(data[size] == 0xee);
        eb_put_bytes(&w, data, SIZE_MAX);
        CHECK(w.bad);

        struct eb_reader r = eb_reader(data, size);
        CHECK(eb_remaining(&r) == size);
        uint64_t eight = eb_get_u64(&r);
        CHECK(r.bad == (size < 8) && eight == (size < 8 ? 0 : 0x0102030405060708));
        uint32_t four = eb_get_u32(&r);
        CHECK(r.bad == (size < 12) && four == (size < 12 ? 0 : 0x090a0b0c));
        uint8_t one = eb_get_u8(&r);
        CHECK(r.bad == (size < 13) && one == (size < 13 ? 0 : 1));
        CHECK((eb_get_bytes(&r, 0) == NULL) == (size < 13));
        CHECK(eb_get_bytes(&r, SIZE_MAX) == NULL && r.bad);
        CHECK(eb_get_bytes(&r, 0) == NULL && eb_get_u8(&r) == 0);
        free(data);
    }
    struct eb_reader nothing = eb_reader(NULL, 0);
    CHECK(eb_remaining(&nothing) == 0 && eb_get_u8(&nothing) == 0 && nothing.bad);
    puts("good");
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    size_t size = 0, capacity = (size_t)EB_MAX_FRAME + 1;
    uint8_t *data = malloc(capacity);
    CHECK(data != NULL);
    size = fread(data, 1, capacity, stdin);
    if (strcmp(mode, "truncate") == 0)
        truncate_payload(data, size);
    else if (strcmp(mode, "corrupt") == 0)
        corrupt_payload(data, size);
    else if (strcmp(mode, "bounds") == 0)
        check_bounds();
    else
        (void)parse(data, size, true);
    free(data);
    return 0;
}
