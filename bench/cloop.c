/* The limit: what it costs a small C program to start /bin/true and reap it.
   It answers the requests of heavy.py, and ignores case and library. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void start_and_reap(void)
{
    static char *const argv[] = {"/bin/true", NULL};
    int status;
    pid_t pid = vfork();

    if (pid == 0) {
        execve(argv[0], argv, environ);
        _exit(127);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) {
        perror("cloop");
        exit(1);
    }
}

int main(void)
{
    long count;

    while (scanf("%*s %*s %ld", &count) == 1) {
        putchar('[');
        for (long i = 0; i < count; i++) {
            long long start = now();
            start_and_reap();
            printf("%s%lld", i ? "," : "", now() - start);
        }
        puts("]");
        fflush(stdout);
    }
    return 0;
}
