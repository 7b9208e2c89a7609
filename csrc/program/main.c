/*
 * errand-boy-helper: serves connections that it gets over its control socket, and starts the commands that they ask
 * for.  It has one thread, which waits only in epoll_wait.
 *
 *   --private         started by the process that it serves: descriptor 4 is that process's pidfd, and new
 *                     processes become that process's children; else it is one of a daemon's
 *   --own-children    keep the children, wait for them and report their ends
 *   --posix-spawn     start through posix_spawn(3); implies --own-children
 *   --max-tasks=N     tell the server after so many starts
 *   --frame-timeout=N milliseconds for the rest of a frame that has begun
 *   --counters        descriptor 4 is a file in memory, for the counters
 *   --open-files=N    the soft limit of open files for commands whose request has none
 *   --uid=N and others: whose process it becomes, see become.h
 *   --job             as the first: it is a job's keeper, see keeper/main.c
 *
 * Descriptor 3 is the control socket.  The helper ends when the caller has ended, or when the control
 * socket is at its end and the last connection has gone; a private one also on SIGTERM, when its work at that
 * time is done.
 */
#include "common/rawsys.h"
#include "owner/become.h"
#include "helper/control.h"
#include "helper/counters.h"
#include "helper/loop.h"
#include "keeper/main.h"
#include "spawn/slices.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CONTROL_FD = 3,
    CALLER_FD = 4,   /* of a private helper */
    COUNTERS_FD = 4, /* of a daemon's helper */
};

enum { PRIVATE, OWN_CHILDREN, POSIX_SPAWN, COUNTERS, FLAGS };
static bool given[FLAGS];

static bool take_option(const char *option)
{
    static const char flags[FLAGS][16] = {"--private", "--own-children", "--posix-spawn", "--counters"};
    static const char names[][18] = {"--open-files=", "--max-tasks=", "--frame-timeout="};
    uint64_t *const values[] = {&helper.self.open_files, &helper.max_tasks, &helper.frame_timeout_ms};
    for (int i = 0; i < FLAGS; i++)
        if (strcmp(option, flags[i]) == 0)
            return given[i] = true;
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(names[i]);
        if (strncmp(option, names[i], length) == 0) {
            *values[i] = strtoull(option + length, NULL, 10);
            return true;
        }
    }
    return false;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--job") == 0)
        return eb_keeper_main(argc, argv);
    helper.frame_timeout_ms = 30000;
    for (int i = 1; i < argc; i++)
        if (!take_option(argv[i]) && !eb_become_option(argv[i])) {
            fprintf(stderr, "errand-boy-helper: for errand_boy only\n");
            return 2;
        }
    const bool private = given[PRIVATE], posix = given[POSIX_SPAWN] || !EB_HAVE_RAW, counters = given[COUNTERS];
    eb_self_keep_descriptors(private || counters ? CONTROL_FD + 1 : CONTROL_FD);
    eb_become(true);
    if (!private && !eb_counters_keep(counters ? COUNTERS_FD : -1))
        eb_fatal("counters");
    if (!private && counters)
        close(COUNTERS_FD);
    int signals = eb_self_block_signals(private); /* also SIGTERM, which a caller may send to all of its children */
    eb_self_read(&helper.self, posix);
    helper.caller = (struct ucred){.pid = getppid(), .uid = getuid(), .gid = getgid()};
    eb_shorten_slices();
    helper.pool = !private;
    helper.owns_children = !private || given[OWN_CHILDREN] || posix;
    helper.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    helper.spawner = posix ? NULL : eb_spawner_clone(&helper.self.state, !helper.owns_children, helper.pool);
    if (helper.spawner == NULL)
        helper.spawner = eb_spawner_posix(&helper.self.state);
    if (eb_connection_new(CONTROL_FD, 0, 0, true) == NULL)
        eb_fatal("control socket");
    if ((private || eb_has_become()) && !eb_tell_ids())
        eb_fatal("ids");
    eb_serve(signals, private ? CALLER_FD : -1);
    return 0;
}
