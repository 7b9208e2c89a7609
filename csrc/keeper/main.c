/*
 * errand-boy-helper --job: keeps one job.  It waits only in epoll_wait, and for the log, if there is one.
 *
 *   --ring=N          bytes of each ring
 *   --log=PATH and others, see log.h
 *   --posix-spawn     start through posix_spawn(3)
 *   --frame-timeout=N milliseconds within which a client must complete what it has begun
 *   --linger=N        milliseconds to wait, after the end, for followers that don't read
 *   --open-files=N    the soft limit of open files for the command, if its request has none
 *   --uid=N and others: whose process it becomes, see become.h
 *
 * Descriptors: 3 is a connection of the server, 4 the socket to which the server connects later, 5 the ring file, 6 the
 * journal, which this process has locked.  Over its connections the server hands over those of clients by ADOPT; the
 * first client may start the command.  All of them may end at any time.
 */
#include "keeper/main.h"

#include "common/rawsys.h"
#include "owner/become.h"
#include "keeper/client.h"
#include "keeper/journal.h"
#include "keeper/log.h"
#include "keeper/loop.h"
#include "spawn/slices.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LEAST_RING = 4 << 10, MOST_RING = 1 << 30 };

/* Not initialized here, so that it does not share a page with data that helpers change. */
struct eb_keeper keeper;

static bool take_number(const char *option)
{
    static const char names[][18] = {"--ring=", "--frame-timeout=", "--linger=", "--open-files="};
    uint64_t *const values[] = {&keeper.ring_size, &keeper.frame_timeout_ms, &keeper.linger_ms,
                                &keeper.self.open_files};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        size_t length = strlen(names[i]);
        if (strncmp(option, names[i], length) == 0) {
            *values[i] = strtoull(option + length, NULL, 10);
            return true;
        }
    }
    return false;
}

int eb_keeper_main(int argc, char **argv)
{
    bool posix = !EB_HAVE_RAW;
    keeper = (struct eb_keeper){
        .ring_size = 256 << 10,
        .frame_timeout_ms = 30000,
        .linger_ms = 30000,
        .fds = {-1, -1, -1},
        .start.done_fd = -1,
    };
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--posix-spawn") == 0)
            posix = true;
        else if (strcmp(argv[i], "--job") != 0 && !take_number(argv[i]) && !eb_log_option(argv[i]) &&
                 !eb_become_option(argv[i])) {
            fprintf(stderr, "errand-boy-helper: a job's keeper has no option %s\n", argv[i]);
            return 2;
        }
    if (keeper.ring_size < LEAST_RING || keeper.ring_size > MOST_RING) {
        fprintf(stderr, "errand-boy-helper: a ring has %d to %d bytes\n", LEAST_RING, MOST_RING);
        return 2;
    }
    eb_self_keep_descriptors(EB_JOURNAL_FD);
    keeper.server = getuid();
    eb_become(false);
    eb_journal_use(EB_JOURNAL_FD);
    const int signals = eb_self_block_signals(false);
    eb_self_read(&keeper.self, posix);
    eb_shorten_slices();
    keeper.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (keeper.null_fd < 0)
        eb_fatal("/dev/null");
    keeper.spawner = posix ? NULL : eb_spawner_clone(&keeper.self.state, false, false);
    if (keeper.spawner == NULL)
        keeper.spawner = eb_spawner_posix(&keeper.self.state);
    const int flags = fcntl(EB_LISTENER_FD, F_GETFL);
    if (flags < 0 || fcntl(EB_LISTENER_FD, F_SETFL, flags | O_NONBLOCK) != 0)
        eb_fatal("listening socket");
    if (eb_client_new(EB_CONTROL_FD, EB_CLIENT_SERVER) == NULL)
        eb_fatal("control socket");
    eb_keeper_serve(signals);
    return 0;
}
