/*
 * posix_spawn(3) has no way to set ids, resource limits or niceness: a request for other values than this process's own
 * fails with ENOTSUP.  The umask and the ignored signals are set in this process around the call, which is safe with
 * one thread.  The call returns when the command runs, so a slow exec holds up all other clients.
 */
#include "spawn/spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

static const struct eb_state *self;

/* posix_spawn performs its actions in order, in the child, so no source may be an earlier action's target.  This
 * replaces such a source by a copy. */
static int move_sources(const struct eb_request *q)
{
    for (uint32_t i = 0; i < eb_request_sources(q); i++) {
        int fd = q->sources[i], least = 3;
        if (!eb_is_target(q, fd) || (i < q->target_count && fd == q->targets[i]))
            continue;
        for (uint32_t tries = 0; tries <= q->target_count && q->sources[i] == fd; tries++) {
            int copy = fcntl(fd, F_DUPFD_CLOEXEC, least);
            if (copy < 0)
                return errno;
            if (eb_is_target(q, copy)) {
                close(copy);
                least = copy + 1;
            } else {
                q->sources[i] = copy;
            }
        }
    }
    return 0;
}

static void close_copies(const struct eb_request *q, const int *originals)
{
    for (uint32_t i = 0; i < eb_request_sources(q); i++)
        if (q->sources[i] != originals[i])
            close(q->sources[i]);
}

#ifdef __GLIBC__
/* glibc has both since 2.29; a program that is also built for older versions does not find them there. */
#pragma weak posix_spawn_file_actions_addfchdir_np
#pragma weak posix_spawn_file_actions_addchdir_np
#endif

static int add_directories(const struct eb_request *q, posix_spawn_file_actions_t *actions)
{
    int error = 0;
#ifdef __GLIBC__
    if (posix_spawn_file_actions_addfchdir_np == NULL || posix_spawn_file_actions_addchdir_np == NULL)
        return eb_has(q, EB_TAG_CWD_FD) || eb_has(q, EB_TAG_CWD) ? ENOTSUP : 0;
#endif
    if (eb_has(q, EB_TAG_CWD_FD))
        error = posix_spawn_file_actions_addfchdir_np(actions, eb_carried(q, EB_TAG_CWD_FD));
    if (error == 0 && eb_has(q, EB_TAG_CWD))
        error = posix_spawn_file_actions_addchdir_np(actions, q->cwd);
    return error;
}

static int add_actions(const struct eb_request *q, posix_spawn_file_actions_t *actions)
{
    int error = 0;
    for (uint32_t i = 0; i < q->target_count && error == 0; i++)
        error = posix_spawn_file_actions_adddup2(actions, q->sources[i], q->targets[i]);
    return error != 0 ? error : add_directories(q, actions);
}

static void to_sigset(uint64_t bits, sigset_t *set)
{
    sigemptyset(set);
    for (int n = 1; n <= EB_SIGNALS; n++)
        if (bits >> (n - 1) & 1)
            (void)sigaddset(set, n);
}

static int add_attributes(const struct eb_request *q, posix_spawnattr_t *attributes)
{
    short flags = 0;
    sigset_t set;
    int error = 0;
    if (eb_has(q, EB_TAG_SIGMASK)) {
        to_sigset(q->sigmask, &set);
        error = posix_spawnattr_setsigmask(attributes, &set);
        flags |= POSIX_SPAWN_SETSIGMASK;
    }
    if (error == 0 && (eb_has(q, EB_TAG_SIGIGN) || eb_has(q, EB_TAG_SIGDEFAULT))) {
        to_sigset((eb_has(q, EB_TAG_SIGIGN) ? self->sigign & ~q->sigign : 0) | q->sigdefault, &set);
        error = posix_spawnattr_setsigdefault(attributes, &set);
        flags |= POSIX_SPAWN_SETSIGDEF;
    }
    if (eb_has(q, EB_TAG_SETSID))
        flags |= POSIX_SPAWN_SETSID;
    if (error == 0 && eb_has(q, EB_TAG_PGROUP) &&
        (q->pgroup == 0 || q->pgroup != self->pgrp || eb_has(q, EB_TAG_SETSID))) {
        error = posix_spawnattr_setpgroup(attributes, q->pgroup);
        flags |= POSIX_SPAWN_SETPGROUP;
    }
    return error != 0 ? error : posix_spawnattr_setflags(attributes, flags);
}

static bool same_rlimits(const struct eb_request *q)
{
    for (int i = 0; i < EB_MAX_RLIMITS; i++)
        if (eb_limits(q, i) && !eb_same_limit(&q->rlimits[i], &self->rlimits[i]))
            return false;
    return true;
}

/* The stage that posix_spawn can't express, or 0. */
static enum eb_stage unsupported(const struct eb_request *q)
{
    static const struct {
        uint8_t tag, stage;
    } steps[] = {
        {EB_TAG_NAMESPACES, EB_STAGE_NAMESPACES},
        {EB_TAG_CGROUP, EB_STAGE_CGROUP},
        {EB_TAG_SANDBOX, EB_STAGE_SANDBOX},
        {EB_TAG_SOCKETS, EB_STAGE_SANDBOX},
        {EB_TAG_RENICE, EB_STAGE_NICE},
        {EB_TAG_SCHEDULER, EB_STAGE_SCHEDULER},
        {EB_TAG_IONICE, EB_STAGE_IONICE},
        {EB_TAG_TIMER_SLACK, EB_STAGE_TIMER_SLACK},
        {EB_TAG_OOM_SCORE_ADJ, EB_STAGE_OOM_SCORE_ADJ},
        {EB_TAG_ROOT, EB_STAGE_ROOT},
        {EB_TAG_CAPABILITIES, EB_STAGE_CAPABILITIES},
        {EB_TAG_SUPERVISE, EB_STAGE_TREE},
        {EB_TAG_CONTROLLING_TERMINAL, EB_STAGE_CONTROLLING_TERMINAL},
        {EB_TAG_TERMINAL, EB_STAGE_CONTROLLING_TERMINAL},
        {EB_TAG_FOREGROUND, EB_STAGE_FOREGROUND},
        {EB_TAG_GROUPS, EB_STAGE_GROUPS},
        {EB_TAG_GID, EB_STAGE_GID},
        {EB_TAG_UID, EB_STAGE_UID},
        {EB_TAG_NO_NEW_PRIVS, EB_STAGE_NO_NEW_PRIVS},
    };
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        if (eb_has(q, steps[i].tag))
            return steps[i].stage;
    if (!same_rlimits(q))
        return EB_STAGE_RLIMITS;
    if (eb_has(q, EB_TAG_NICE) && q->nice != self->nice)
        return EB_STAGE_NICE;
    if (eb_has(q, EB_TAG_AFFINITY) &&
        (q->affinity_size != self->affinity_size || memcmp(q->affinity, self->affinity, q->affinity_size) != 0))
        return EB_STAGE_AFFINITY;
    return 0;
}

static void set_ignored(uint64_t signals, void (*action)(int))
{
    for (int n = 1; n <= EB_SIGNALS; n++)
        if (signals >> (n - 1) & 1)
            (void)signal(n, action);
}

static int spawn_first(const struct eb_request *q, pid_t *pid, const posix_spawn_file_actions_t *actions,
                       const posix_spawnattr_t *attributes)
{
    char **env = q->env != NULL ? q->env : environ;
    int first = 0, error = ENOENT;
    for (char **path = q->executables; *path != NULL; path++) {
        error = posix_spawn(pid, *path, actions, attributes, q->argv, env);
        if (error == 0)
            return 0;
        if (error != ENOENT && error != ENOTDIR && first == 0)
            first = error;
    }
    return first != 0 ? first : error;
}

/* posix_spawn does not say what failed.  This tries whether the directory can be entered. */
static enum eb_stage guess_stage(const struct eb_request *q)
{
    struct stat info;
    if (eb_has(q, EB_TAG_CWD) && (stat(q->cwd, &info) != 0 || !S_ISDIR(info.st_mode) || access(q->cwd, X_OK) != 0))
        return EB_STAGE_CWD;
    return EB_STAGE_EXEC;
}

static void begin(struct eb_start *start, const struct eb_request *q, bool apart)
{
    (void)apart; /* the exec closes them */
    size_t size = eb_request_sources(q) * sizeof(int);
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    *start = (struct eb_start){.done_fd = -1, .owner = EB_OWNER_HELPER, .stage = unsupported(q)};
    if (start->stage != 0) {
        start->error = ENOTSUP;
        return;
    }
    start->stage = EB_STAGE_START;
    int *originals = malloc(size + 1);
    if (originals == NULL) {
        start->error = ENOMEM;
        return;
    }
    memcpy(originals, q->sources, size);
    if ((start->error = posix_spawn_file_actions_init(&actions)) != 0)
        goto no_actions;
    if ((start->error = posix_spawnattr_init(&attributes)) != 0)
        goto no_attributes;
    if ((start->error = move_sources(q)) != 0 || (start->error = add_actions(q, &actions)) != 0 ||
        (start->error = add_attributes(q, &attributes)) != 0)
        goto no_spawn;

    uint64_t also_ignored = eb_has(q, EB_TAG_SIGIGN) ? q->sigign & ~self->sigign & ~q->sigdefault : 0;
    mode_t umask_before = eb_has(q, EB_TAG_UMASK) ? umask(q->umask) : 0;
    set_ignored(also_ignored, SIG_IGN);
    start->error = spawn_first(q, &start->pid, &actions, &attributes);
    set_ignored(also_ignored, SIG_DFL);
    if (eb_has(q, EB_TAG_UMASK))
        umask(umask_before);
    if (start->error != 0) {
        start->pid = 0;
        start->stage = guess_stage(q);
    }
no_spawn:
    close_copies(q, originals);
    posix_spawnattr_destroy(&attributes);
no_attributes:
    posix_spawn_file_actions_destroy(&actions);
no_actions:
    free(originals);
}

static void end(struct eb_start *start)
{
    (void)start; /* the outcome was known at once */
}

static void trim(unsigned kept)
{
    (void)kept;
}

const struct eb_spawner *eb_spawner_posix(const struct eb_state *state)
{
    static const struct eb_spawner spawner = {.begin = begin, .end = end, .trim = trim};
    self = state;
    return &spawner;
}
