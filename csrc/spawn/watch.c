/*
 * The kernel reports what a tree uses only through cgroups.  So the supervisor polls, more often the less is left:
 * until the next poll, the tree can't use more than its CPUs can fill, or fork, in that time.
 */
#include "spawn/watch.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include "spawn/rawtext.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

enum {
    TICKS = 100, /* USER_HZ, the unit of /proc, the same on all architectures that we support */
    MOST_TEXT = 2048,
    BYTES_PER_NS = 4,     /* that one CPU can fill */
    NS_PER_FORK = 100000, /* that a fork takes at least, with or without an exec */
    LEAST_NS = 2000000,   /* between polls */
    MOST_NS = 100000000,
    MOST_MAPPED = 64 << 20, /* bytes of files that a process has mapped */
};

/* Opens /proc/PID/NAME, or with `thread` /proc/PID/task/THREAD/NAME. */
static EB_BARE long open_proc(pid_t pid, pid_t thread, const char *name)
{
    char path[64];
    int size = eb_write_text(path, "/proc/");
    size += eb_write_number(path + size, (unsigned)pid);
    if (thread != 0) {
        size += eb_write_text(path + size, "/task/");
        size += eb_write_number(path + size, (unsigned)thread);
    }
    path[size++] = '/';
    size += eb_write_text(path + size, name);
    path[size] = '\0';
    return eb_raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0);
}

/* The beginning of a file of a process, as a string; its size, or less than 1. */
static EB_BARE long read_proc(pid_t pid, const char *name, char *text)
{
    long fd = open_proc(pid, 0, name);
    if (fd < 0)
        return fd;
    long size = eb_raw(SYS_read, fd, (long)text, MOST_TEXT - 1, 0);
    eb_raw(SYS_close, fd, 0, 0, 0);
    text[size > 0 ? size : 0] = '\0';
    return size;
}

static EB_BARE uint64_t number_at(const char *text)
{
    uint64_t number = 0;
    while (*text == ' ' || *text == '\t')
        text++;
    for (; *text >= '0' && *text <= '9'; text++)
        number = number * 10 + (uint64_t)(*text - '0');
    return number;
}

/* The process's own CPU time, and that of the children that it has waited for. */
static EB_BARE uint64_t ticks_of(pid_t pid)
{
    char text[MOST_TEXT];
    const char *at = text, *end = NULL;
    if (read_proc(pid, "stat", text) <= 0)
        return 0;
    for (; *at != '\0'; at++)
        if (*at == ')') /* the last one ends the name, which may contain some too */
            end = at;
    if (end == NULL)
        return 0;
    uint64_t ticks = 0;
    int field = 2;
    for (at = end; *at != '\0' && field < 17; at++)
        if (*at == ' ' && ++field >= 14)
            ticks += number_at(at);
    return ticks;
}

/* The process's own memory, without the files that it has mapped, which others may have mapped too. */
static EB_BARE uint64_t memory_of(pid_t pid)
{
    static const char anonymous[] = "\nRssAnon:", shared[] = "\nRssShmem:", swapped[] = "\nVmSwap:";
    const char *const labels[] = {anonymous, shared, swapped};
    char text[MOST_TEXT];
    uint64_t kib = 0;
    if (read_proc(pid, "status", text) <= 0)
        return 0;
    for (const char *at = text; *at != '\0'; at++)
        for (int i = 0; *at == '\n' && i < 3; i++) {
            int n = 0;
            while (labels[i][n] != '\0' && at[n] == labels[i][n])
                n++;
            if (labels[i][n] == '\0')
                kib += number_at(at + n);
        }
    return kib << 10;
}

/* -- one poll -- */

struct look {
    pid_t *found;
    uint32_t count, most;
    bool is_full; /* there are more */
};

/* The children of a thread. */
static EB_BARE void find_children(struct look *look, pid_t pid, pid_t thread)
{
    char text[256];
    pid_t child = 0;
    long size, fd = open_proc(pid, thread, "children");
    if (fd < 0)
        return;
    while ((size = eb_raw(SYS_read, fd, (long)text, sizeof text, 0)) > 0 && !look->is_full)
        for (long i = 0; i < size; i++) {
            if (text[i] >= '0' && text[i] <= '9') {
                child = child * 10 + (text[i] - '0');
            } else if (child != 0) {
                look->is_full = look->count == look->most;
                if (!look->is_full)
                    look->found[look->count++] = child;
                child = 0;
            }
        }
    eb_raw(SYS_close, fd, 0, 0, 0);
}

struct entry {
    uint64_t inode, offset;
    uint16_t size;
    uint8_t kind;
    char name[];
};

static EB_BARE void find_children_of_threads(struct look *look, pid_t pid)
{
    char text[1024] __attribute__((aligned(8)));
    long size, fd = open_proc(pid, 0, "task");
    if (fd < 0)
        return;
    while ((size = eb_raw(SYS_getdents64, fd, (long)text, sizeof text, 0)) > 0 && !look->is_full)
        for (long at = 0; at < size;) {
            const struct entry *entry = (const struct entry *)(text + at);
            pid_t thread = (pid_t)number_at(entry->name);
            if (thread != 0)
                find_children(look, pid, thread);
            at += entry->size;
        }
    eb_raw(SYS_close, fd, 0, 0, 0);
}

/* The CPU time of processes that have been waited for, by their parents or by this process. */
static EB_BARE uint64_t cpu_of_the_past(void)
{
    struct rusage usage = {0};
    eb_raw(SYS_getrusage, RUSAGE_CHILDREN, (long)&usage, 0, 0);
    return eb_watch_us(&usage.ru_utime) + eb_watch_us(&usage.ru_stime);
}

/* Counts the processes and their CPU time, unless there are too many.  Returns their memory. */
static EB_BARE uint64_t count(struct eb_watch *w, struct look *look)
{
    const pid_t self = (pid_t)eb_raw(SYS_getpid, 0, 0, 0, 0);
    uint64_t ticks = 0, memory = 0;
    /* This comes first, because a process that forks without end makes it take longer and longer. */
    find_children(look, self, self);
    for (uint32_t i = 0; i < look->count && !look->is_full; i++)
        find_children_of_threads(look, look->found[i]);
    for (uint32_t i = 0; i < look->count && !look->is_full; i++) {
        ticks += ticks_of(look->found[i]);
        memory += memory_of(look->found[i]);
    }
    uint64_t cpu_us = ticks * (1000000 / TICKS) + cpu_of_the_past();
    if (cpu_us > w->cpu_us) /* a process that ends during this count is missing from it once */
        w->cpu_us = cpu_us;
    if (memory > w->peak_memory)
        w->peak_memory = memory;
    if (look->count > w->peak_processes)
        w->peak_processes = look->count;
    return memory;
}

static EB_BARE uint64_t now_ns(void)
{
    struct timespec t = {0};
    eb_raw(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, 0, 0);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static EB_BARE int64_t least(int64_t a, uint64_t b)
{
    return b < (uint64_t)a ? (int64_t)b : a;
}

/* Returns the limit that is exceeded now, or sets `*ns` to the time within which none can be. */
static EB_BARE enum eb_cause look(struct eb_watch *w, uint64_t now, int64_t *ns)
{
    const struct eb_limits *limits = &w->limits;
    const bool counts = limits->processes != 0 && limits->processes < EB_MAX_PROCESSES;
    struct look found = {.found = w->found, .most = counts ? limits->processes : EB_MAX_PROCESSES};
    const uint64_t memory = count(w, &found);
    if (found.is_full)
        return EB_CAUSE_PROCESSES;
    if (limits->memory != 0 && memory > limits->memory)
        return EB_CAUSE_MEMORY;
    if (limits->cpu_us != 0 && w->cpu_us >= limits->cpu_us)
        return EB_CAUSE_CPU;
    *ns = MOST_NS;
    if (limits->processes != 0)
        *ns = least(*ns, (uint64_t)(limits->processes - found.count + 1) * NS_PER_FORK / w->cpus);
    if (limits->memory != 0)
        *ns = least(*ns, (limits->memory - memory) / BYTES_PER_NS / w->cpus);
    if (limits->cpu_us != 0)
        *ns = least(*ns, (limits->cpu_us - w->cpu_us) * 1000 / w->cpus);
    /* Polling takes at most a twentieth of a CPU. */
    uint64_t cost = (now_ns() - now) * 20;
    if (*ns < LEAST_NS)
        *ns = LEAST_NS;
    if ((uint64_t)*ns < cost)
        *ns = (int64_t)cost;
    return EB_CAUSE_NONE;
}

EB_BARE enum eb_cause eb_watch_look(struct eb_watch *w, int64_t *pause_ns)
{
    const struct eb_limits *limits = &w->limits;
    const uint64_t now = now_ns(), wall_ns = limits->wall_us * 1000, past_ns = now - w->begun_ns;
    if (wall_ns != 0 && past_ns >= wall_ns)
        return EB_CAUSE_TIMEOUT;
    if (now >= w->next_ns) {
        int64_t ns = INT64_MAX;
        if (limits->cpu_us != 0 || limits->memory != 0 || limits->processes != 0) {
            enum eb_cause cause = look(w, now, &ns);
            if (cause != EB_CAUSE_NONE)
                return cause;
        }
        w->next_ns = now + (uint64_t)ns;
    }
    *pause_ns = (int64_t)(w->next_ns - now);
    if (wall_ns != 0)
        *pause_ns = least(*pause_ns, wall_ns - past_ns);
    return EB_CAUSE_NONE;
}

EB_BARE enum eb_cause eb_watch_conclude(const struct eb_watch *w, const struct rusage *tree)
{
    const struct eb_limits *limits = &w->limits;
    if (limits->cpu_us != 0 && eb_watch_us(&tree->ru_utime) + eb_watch_us(&tree->ru_stime) >= limits->cpu_us)
        return EB_CAUSE_CPU;
    /* The peak includes mapped files. */
    if (limits->memory != 0 && (uint64_t)tree->ru_maxrss << 10 > limits->memory + MOST_MAPPED)
        return EB_CAUSE_MEMORY;
    return EB_CAUSE_NONE;
}

struct eb_watch *eb_watch_new(const struct eb_limits *limits)
{
    cpu_set_t cpus;
    struct eb_watch *w = mmap(NULL, sizeof *w, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w == MAP_FAILED)
        return NULL;
    w->limits = *limits;
    /* If there are more CPUs than the call can report, the exact number no longer matters for the pauses. */
    w->cpus = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? (unsigned)CPU_COUNT(&cpus) : CPU_SETSIZE;
    w->begun_ns = now_ns();
    return w;
}

#endif
