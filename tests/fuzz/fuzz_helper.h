/* Included first when the helper's sources are compiled, so that the harness replaces the kernel: see fuzz_helper.c. */
#ifndef FUZZ_HELPER_H
#define FUZZ_HELPER_H

#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int fuzz_epoll_wait(int fd, struct epoll_event *events, int most, int timeout);
int fuzz_clock_gettime(clockid_t clock, struct timespec *t);
int fuzz_kill(pid_t pid, int number);
pid_t fuzz_wait4(pid_t pid, int *status, int options, struct rusage *usage);
long fuzz_syscall(long number, ...);

#define epoll_wait fuzz_epoll_wait
#define clock_gettime fuzz_clock_gettime
#define kill fuzz_kill
#define wait4 fuzz_wait4
#define syscall fuzz_syscall
#endif
