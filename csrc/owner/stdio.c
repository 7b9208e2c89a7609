#include "owner/stdio.h"

#include "owner/terminal.h"

#include <fcntl.h>
#include <unistd.h>

bool eb_stdio_open(const struct eb_request *q, int ours[3], int theirs[3])
{
    const bool terminal = eb_has(q, EB_TAG_TERMINAL);
    if (terminal && !eb_terminal_open(q, ours, theirs))
        return false;
    for (int i = terminal ? 2 : 0; i < 3; i++) {
        int pipe[2];
        if (!(q->streams >> i & 1))
            continue;
        if (pipe2(pipe, O_CLOEXEC) != 0)
            return false;
        ours[i] = i == 0 ? pipe[1] : pipe[0];
        theirs[i] = i == 0 ? pipe[0] : pipe[1];
        /* Each end has flags of its own: the command's stays blocking. */
        if (fcntl(ours[i], F_SETFL, O_NONBLOCK) != 0)
            return false;
    }
    return true;
}

static int made_source(const struct eb_request *q, int target, const int theirs[3], int null)
{
    if (q->nulls >> target & 1)
        return null;
    return target == 2 && (q->streams & EB_JOINED) ? theirs[1] : theirs[target];
}

void eb_stdio_place(struct eb_request *q, const struct eb_fds *sent, const int theirs[3], int null)
{
    uint32_t next = 0;
    for (uint32_t i = 0; i < eb_request_sources(q); i++)
        if (i < q->target_count && eb_is_made(q, q->targets[i]))
            q->sources[i] = made_source(q, q->targets[i], theirs, null);
        else
            q->sources[i] = sent->at[next++];
}

void eb_stdio_close(int fds[3])
{
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}
