#include "common/state.h"

#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t ignored_signals(void)
{
    uint64_t set = 0;
    for (int n = 1; n <= EB_SIGNALS; n++) {
        /* glibc hides two signals, so this asks the kernel, whose own struct begins with the handler. */
        struct {
            uintptr_t handler, flags, restorer, mask[16];
        } action;
        bool ignored =
            syscall(SYS_rt_sigaction, n, NULL, &action, sizeof(uint64_t)) == 0 && action.handler == (uintptr_t)SIG_IGN;
        set |= (uint64_t)ignored << (n - 1);
    }
    return set;
}

static uint64_t blocked_signals(uint64_t known)
{
    /* The sigset_t functions refuse the two signals that glibc keeps for itself; the kernel does not. */
    uint64_t set = 0;
    return syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &set, sizeof set) == 0 ? set : known;
}

void eb_state_read_signals(struct eb_state *s)
{
    s->sigmask = blocked_signals(s->sigmask);
    s->sigign = ignored_signals();
}

static int read_limit(int resource, struct rlimit *limit)
{
#if defined(SYS_getrlimit) && defined(__LP64__)
    /* The C library uses prlimit64, which takes more than twice as long.  Elsewhere this call has too few bits. */
    if (syscall(SYS_getrlimit, resource, limit) == 0)
        return 0;
#endif
    return getrlimit((unsigned)resource, limit);
}

void eb_state_read(struct eb_state *s)
{
    s->pgrp = getpgrp();
    errno = 0;
    int nice = getpriority(PRIO_PROCESS, 0);
    if (nice != -1 || errno == 0)
        s->nice = nice;
    for (int i = 0; i < EB_MAX_RLIMITS; i++) {
        struct rlimit limit;
        if (read_limit(i, &limit) == 0)
            s->rlimits[i] = limit;
    }
    long size = syscall(SYS_sched_getaffinity, 0, sizeof s->affinity, s->affinity);
    s->affinity_size = size > 0 ? (uint32_t)size : 0;
}
