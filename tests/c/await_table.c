/* Tests that a new process that does not take its own table of descriptors in time goes no further, and that its
 * start fails. */
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "spawn/spawn_job.h"

int main(void)
{
    static struct eb_job job = {.alive = 1, .shares_table = EB_SHARED};
    int status;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0)
        for (;;)
            pause();
    eb_job_await_table(&job, &job.alive, pid);
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    CHECK(job.error == EAGAIN && job.stage == EB_STAGE_START);
    CHECK(eb_tell_table(&job) == -EAGAIN);

    job.shares_table = EB_SHARED;
    CHECK(eb_tell_table(&job) == 0);
    eb_job_await_table(&job, &job.alive, getpid()); /* at once */
    return 0;
}
