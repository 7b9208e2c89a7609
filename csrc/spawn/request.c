#include "spawn/request.h"

#include "common/rawsys.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct value {
    const uint8_t *at;
    size_t size;
};

static const struct {
    char name[24];
    int8_t size; /* exact; -1: checked when the value is read */
} options[EB_TAG_END] = {
    [EB_TAG_EXECUTABLES] = {"EXECUTABLES", -1},
    [EB_TAG_ARGV] = {"ARGV", -1},
    [EB_TAG_ENV] = {"ENV", -1},
    [EB_TAG_FDS] = {"FDS", -1},
    [EB_TAG_CWD_FD] = {"CWD_FD", 0},
    [EB_TAG_CWD] = {"CWD", -1},
    [EB_TAG_UMASK] = {"UMASK", 4},
    [EB_TAG_SIGMASK] = {"SIGMASK", 8},
    [EB_TAG_SIGIGN] = {"SIGIGN", 8},
    [EB_TAG_SETSID] = {"SETSID", 0},
    [EB_TAG_PGROUP] = {"PGROUP", 4},
    [EB_TAG_RLIMITS] = {"RLIMITS", -1},
    [EB_TAG_NICE] = {"NICE", 4},
    [EB_TAG_AFFINITY] = {"AFFINITY", -1},
    [EB_TAG_GROUPS] = {"GROUPS", -1},
    [EB_TAG_GID] = {"GID", 4},
    [EB_TAG_UID] = {"UID", 4},
    [EB_TAG_STREAMS] = {"STREAMS", 1},
    [EB_TAG_ON_CLOSE] = {"ON_CLOSE", 4},
    [EB_TAG_NULL] = {"NULL", 1},
    [EB_TAG_COALESCE] = {"COALESCE", 0},
    [EB_TAG_SIGDEFAULT] = {"SIGDEFAULT", 8},
    [EB_TAG_NO_NEW_PRIVS] = {"NO_NEW_PRIVS", 0},
    [EB_TAG_SET_RLIMITS] = {"SET_RLIMITS", -1},
    [EB_TAG_CONTROLLING_TERMINAL] = {"CONTROLLING_TERMINAL", 0},
    [EB_TAG_FOREGROUND] = {"FOREGROUND", 0},
    [EB_TAG_TERMINAL] = {"TERMINAL", 17},
    [EB_TAG_CGROUP] = {"CGROUP", 0},
    [EB_TAG_NAMESPACES] = {"NAMESPACES", 4},
    [EB_TAG_SANDBOX] = {"SANDBOX", 0},
    [EB_TAG_SOCKETS] = {"SOCKETS", 1},
    [EB_TAG_RENICE] = {"RENICE", 4},
    [EB_TAG_SCHEDULER] = {"SCHEDULER", 8},
    [EB_TAG_IONICE] = {"IONICE", 4},
    [EB_TAG_TIMER_SLACK] = {"TIMER_SLACK", 8},
    [EB_TAG_SIGNALS_DEFAULT] = {"SIGNALS_DEFAULT", 8},
    [EB_TAG_SIGNALS_IGNORED] = {"SIGNALS_IGNORED", 8},
    [EB_TAG_OOM_SCORE_ADJ] = {"OOM_SCORE_ADJ", 4},
    [EB_TAG_ROOT] = {"ROOT", -1},
    [EB_TAG_CAPABILITIES] = {"CAPABILITIES", 8},
    [EB_TAG_SUPERVISE] = {"SUPERVISE", 5},
    [EB_TAG_LIMITS] = {"LIMITS", 28},
    [EB_TAG_QUEUE] = {"QUEUE", 5},
};

static int malformed(char *reason, enum eb_tag tag, const char *what)
{
    snprintf(reason, EB_MAX_REASON, "option %s: %s", options[tag].name, what);
    return -1;
}

/* The count that a string list declares, checked before anything is allocated for it. */
static uint32_t string_count(struct value v)
{
    struct eb_reader r = eb_reader(v.at, v.size);
    return eb_get_u32(&r);
}

/* Fills `list` with the strings of `v` and a NULL; false if count and bytes do not agree. */
static bool get_strings(struct value v, char **list)
{
    struct eb_reader r = eb_reader(v.at, v.size);
    uint32_t count = eb_get_u32(&r);
    for (uint32_t i = 0; i < count; i++) {
        size_t left = eb_remaining(&r);
        const uint8_t *nul = left > 0 ? memchr(r.at, 0, left) : NULL;
        if (nul == NULL)
            return false;
        /* execve's prototype lacks a const; nothing writes through these pointers. */
        list[i] = (char *)(uintptr_t)eb_get_bytes(&r, (size_t)(nul - r.at) + 1);
    }
    list[count] = NULL;
    return !r.bad && eb_remaining(&r) == 0;
}

static int get_string_lists(struct eb_request *q, const struct value *values, char *reason)
{
    static const enum eb_tag tags[] = {EB_TAG_EXECUTABLES, EB_TAG_ARGV, EB_TAG_ENV};
    char ***lists[] = {&q->executables, &q->argv, &q->env};
    size_t total = 0;
    for (size_t i = 0; i < 3; i++)
        if (eb_has(q, tags[i])) {
            uint32_t count = string_count(values[tags[i]]);
            if (values[tags[i]].size < 4 || count > values[tags[i]].size - 4)
                return malformed(reason, tags[i], "not a string list");
            total += count + 1;
        }
    if (total > EB_MAX_STRINGS)
        return E2BIG;
    q->strings = malloc((total + 1) * sizeof *q->strings);
    if (q->strings == NULL)
        return ENOMEM;
    char **next = q->strings;
    for (size_t i = 0; i < 3; i++)
        if (eb_has(q, tags[i])) {
            if (!get_strings(values[tags[i]], next))
                return malformed(reason, tags[i], "not a string list");
            *lists[i] = next;
            next += string_count(values[tags[i]]) + 1;
        }
    return 0;
}

/* The numbers of FDS, and those of the descriptors that the helper makes, which are the lowest, in one ascending
 * list. */
static int get_targets(struct eb_request *q, struct value v, char *reason)
{
    uint32_t count = (uint32_t)(v.size / 4);
    if (v.size % 4 != 0 || v.size / 4 > EB_MAX_FDS)
        return malformed(reason, EB_TAG_FDS, "bad length");
    q->targets = malloc((count + 3 + 1) * sizeof *q->targets);
    if (q->targets == NULL)
        return ENOMEM;
    /* Without FDS, `v` has no bytes. */
    struct eb_reader r = count > 0 ? eb_reader(v.at, v.size) : (struct eb_reader){0};
    int made = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t target = eb_get_u32(&r);
        for (; made < 3 && (uint32_t)made < target; made++)
            if (eb_is_made(q, made))
                q->targets[q->target_count++] = made;
        bool ascends = q->target_count == 0 || (int)target > q->targets[q->target_count - 1];
        if (target > INT_MAX || !ascends)
            return malformed(reason, EB_TAG_FDS, "numbers are not ascending");
        if (eb_is_made(q, (int)target))
            return malformed(reason, EB_TAG_FDS, "names a descriptor that STREAMS or NULL has");
        q->targets[q->target_count++] = (int)target;
    }
    for (; made < 3; made++)
        if (eb_is_made(q, made) && (q->target_count == 0 || made > q->targets[q->target_count - 1]))
            q->targets[q->target_count++] = made;
    return 0;
}

static int get_groups(struct eb_request *q, struct value v, char *reason)
{
    if (v.size % 4 != 0 || v.size / 4 > EB_MAX_GROUPS)
        return malformed(reason, EB_TAG_GROUPS, "bad length");
    q->group_count = (uint32_t)(v.size / 4);
    q->groups = malloc((q->group_count + 1) * sizeof *q->groups);
    if (q->groups == NULL)
        return ENOMEM;
    struct eb_reader r = eb_reader(v.at, v.size);
    for (uint32_t i = 0; i < q->group_count; i++)
        q->groups[i] = eb_get_u32(&r);
    return 0;
}

static int get_terminal(struct eb_request *q, struct value v, char *reason)
{
    struct eb_reader r = eb_reader(v.at, v.size);
    uint32_t numbers[4];
    for (int i = 0; i < 4; i++)
        if ((numbers[i] = eb_get_u32(&r)) > UINT16_MAX)
            return malformed(reason, EB_TAG_TERMINAL, "no terminal has so many");
    q->size = (struct winsize){(uint16_t)numbers[0], (uint16_t)numbers[1], (uint16_t)numbers[2], (uint16_t)numbers[3]};
    q->terminal = eb_get_u8(&r);
    return q->terminal > (EB_NO_ECHO | EB_RAW) ? malformed(reason, EB_TAG_TERMINAL, "no such bit") : 0;
}

/* Called for RLIMITS, and then for SET_RLIMITS, whose number is higher. */
static int get_rlimits(struct eb_request *q, enum eb_tag tag, struct value v, char *reason)
{
    if (v.size % 17 != 0 || v.size / 17 > EB_MAX_RLIMITS)
        return malformed(reason, tag, "bad length");
    struct eb_reader r = eb_reader(v.at, v.size);
    while (eb_remaining(&r) > 0) {
        uint8_t resource = eb_get_u8(&r);
        if (resource >= EB_MAX_RLIMITS)
            return malformed(reason, tag, "no such resource");
        q->limited |= (uint16_t)(1 << resource);
        q->rlimits[resource].rlim_cur = eb_get_u64(&r);
        q->rlimits[resource].rlim_max = eb_get_u64(&r);
        if (tag == EB_TAG_SET_RLIMITS)
            q->set_limits |= (uint16_t)(1 << resource);
        else if (resource == RLIMIT_NPROC)
            q->nproc = q->rlimits[resource].rlim_cur;
    }
    return 0;
}

static int get_value(struct eb_request *q, enum eb_tag tag, struct value v, char *reason)
{
    if (options[tag].size >= 0 && v.size != (size_t)options[tag].size)
        return malformed(reason, tag, "bad length");
    struct eb_reader r = eb_reader(v.at, v.size);
    switch (tag) {
    case EB_TAG_CWD:
    case EB_TAG_ROOT:
        if (v.size == 0 || memchr(v.at, 0, v.size) != v.at + v.size - 1)
            return malformed(reason, tag, "not one string");
        *(tag == EB_TAG_CWD ? &q->cwd : &q->root) = (const char *)v.at;
        break;
    case EB_TAG_UMASK:
        q->umask = eb_get_u32(&r) & 0777;
        break;
    case EB_TAG_SIGMASK:
        q->sigmask = eb_get_u64(&r);
        break;
    case EB_TAG_SIGIGN:
        q->sigign = eb_get_u64(&r);
        break;
    case EB_TAG_SIGDEFAULT:
    case EB_TAG_SIGNALS_DEFAULT: /* after SIGDEFAULT, whose number is lower */
        q->sigdefault |= eb_get_u64(&r) & ~((uint64_t)1 << (SIGKILL - 1) | (uint64_t)1 << (SIGSTOP - 1));
        break;
    case EB_TAG_SIGNALS_IGNORED: { /* after the tags that it overrides */
        uint64_t ignored = eb_get_u64(&r);
        q->sigign |= ignored;
        q->sigdefault &= ~ignored;
        break;
    }
    case EB_TAG_PGROUP:
        q->pgroup = (int32_t)eb_get_u32(&r);
        break;
    case EB_TAG_RLIMITS:
    case EB_TAG_SET_RLIMITS:
        return get_rlimits(q, tag, v, reason);
    case EB_TAG_NICE:
        q->nice = (int32_t)eb_get_u32(&r);
        break;
    case EB_TAG_AFFINITY:
        if (v.size == 0 || v.size > EB_MAX_AFFINITY)
            return malformed(reason, tag, "bad length");
        q->affinity = v.at;
        q->affinity_size = (uint32_t)v.size;
        break;
    case EB_TAG_GROUPS:
        return get_groups(q, v, reason);
    case EB_TAG_GID:
        q->gid = eb_get_u32(&r);
        break;
    case EB_TAG_UID:
        q->uid = eb_get_u32(&r);
        break;
    case EB_TAG_STREAMS:
        q->streams = eb_get_u8(&r);
        if (q->streams > 15 || ((q->streams & EB_JOINED) != 0 && (q->streams & 6) != 2))
            return malformed(reason, tag, "no such descriptor");
        break;
    case EB_TAG_NULL: /* after STREAMS, whose number is lower */
        q->nulls = eb_get_u8(&r);
        if (q->nulls > 7)
            return malformed(reason, tag, "no such descriptor");
        if (q->nulls & (q->streams | (q->streams & EB_JOINED ? 4 : 0)))
            return malformed(reason, tag, "names a streamed descriptor");
        break;
    case EB_TAG_SUPERVISE:
        q->tree_all = (eb_get_u8(&r) & 1) != 0;
        q->drain_ms = eb_get_u32(&r);
        break;
    case EB_TAG_TERMINAL:
        return get_terminal(q, v, reason);
    case EB_TAG_ON_CLOSE:
        q->on_close_ms = eb_get_u32(&r);
        break;
    case EB_TAG_NAMESPACES:
        q->namespaces = eb_get_u32(&r);
        if (q->namespaces & ~EB_NAMESPACES)
            return malformed(reason, tag, "no such namespace");
        break;
    case EB_TAG_LIMITS:
        q->limits.wall_us = eb_get_u64(&r);
        q->limits.cpu_us = eb_get_u64(&r);
        q->limits.memory = eb_get_u64(&r);
        q->limits.processes = eb_get_u32(&r);
        break;
    case EB_TAG_QUEUE:
        q->queue = eb_get_u32(&r);
        q->places = eb_get_u8(&r);
        if (q->places == 0 || q->places > EB_MAX_PLACES)
            return malformed(reason, tag, "no such number of places");
        break;
    case EB_TAG_SOCKETS:
        q->sockets = eb_get_u8(&r);
        if (q->sockets > EB_SOCKETS_ANY)
            return malformed(reason, tag, "no such sockets");
        break;
    case EB_TAG_RENICE:
        q->renice = (int32_t)eb_get_u32(&r);
        break;
    case EB_TAG_SCHEDULER:
        q->policy = eb_get_u32(&r);
        q->priority = eb_get_u32(&r);
        break;
    case EB_TAG_IONICE:
        q->ionice = eb_get_u32(&r);
        break;
    case EB_TAG_TIMER_SLACK:
        q->timer_slack = eb_get_u64(&r);
        break;
    case EB_TAG_OOM_SCORE_ADJ:
        q->oom_score_adj = (int32_t)eb_get_u32(&r);
        break;
    case EB_TAG_CAPABILITIES:
        q->capabilities = eb_get_u64(&r);
        break;
    default: /* string lists and descriptors, which are read together; and empty values */
        break;
    }
    return 0;
}

int eb_request_parse(struct eb_request *q, const uint8_t *payload, size_t size, char *reason)
{
    struct value values[EB_TAG_END] = {{0}};
    *q = (struct eb_request){.nproc = RLIM_INFINITY};
    struct eb_reader r = eb_reader(payload, size);
    while (eb_remaining(&r) > 0) {
        uint8_t tag = eb_get_u8(&r);
        uint32_t length = eb_get_u32(&r);
        const uint8_t *at = eb_get_bytes(&r, length);
        if (at == NULL) {
            snprintf(reason, EB_MAX_REASON, "an option is longer than its frame");
            return -1;
        }
        if (tag == 0 || tag >= EB_TAG_END) {
            snprintf(reason, EB_MAX_REASON, "unknown option %u", (unsigned)tag);
            return -1;
        }
        if (eb_has(q, tag))
            return malformed(reason, tag, "given twice");
        q->present |= (uint64_t)1 << tag;
        values[tag] = (struct value){.at = at, .size = length};
    }
    if (!eb_has(q, EB_TAG_EXECUTABLES) || !eb_has(q, EB_TAG_ARGV)) {
        snprintf(reason, EB_MAX_REASON, "options EXECUTABLES and ARGV are required");
        return -1;
    }
    for (enum eb_tag tag = 1; tag < EB_TAG_END; tag++)
        if (eb_has(q, tag)) {
            int error = get_value(q, tag, values[tag], reason);
            if (error != 0)
                return error;
        }
    if (eb_has(q, EB_TAG_FDS) || eb_made(q) != 0) {
        int error = get_targets(q, values[EB_TAG_FDS], reason);
        if (error != 0)
            return error;
    }
    q->sources = malloc((eb_request_sources(q) + 1) * sizeof *q->sources);
    if (q->sources == NULL)
        return ENOMEM;
    return get_string_lists(q, values, reason);
}

EB_BARE bool eb_is_target(const struct eb_request *q, long fd)
{
    uint32_t low = 0, high = q->target_count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (q->targets[middle] < fd)
            low = middle + 1;
        else
            high = middle;
    }
    return low < q->target_count && q->targets[low] == fd;
}

void eb_request_free(struct eb_request *q)
{
    free(q->strings);
    free(q->targets);
    free(q->sources);
    free(q->groups);
    *q = (struct eb_request){0};
}
