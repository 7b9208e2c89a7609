/*
 * System calls without the C library: no errno (a thread-local variable, which a process made with CLONE_VM shares with
 * its maker), no cancellation, no change of all threads' ids.  Each returns the kernel's own result: -errno on failure.
 */
#ifndef EB_RAWSYS_H
#define EB_RAWSYS_H

#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>

#if defined(EB_PORTABLE) /* for tests: act as on other processors */
#define EB_HAVE_RAW 0

#elif defined(__x86_64__)
#define EB_HAVE_RAW 1

static inline long eb_raw5(long n, long a, long b, long c, long d, long e)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

#elif defined(__aarch64__)
#define EB_HAVE_RAW 1

static inline long eb_raw5(long n, long a, long b, long c, long d, long e)
{
    register long x8 __asm__("x8") = n;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory", "cc");
    return x0;
}

#else
#define EB_HAVE_RAW 0
#endif

#if EB_HAVE_RAW
static inline long eb_raw(long n, long a, long b, long c, long d)
{
    return eb_raw5(n, a, b, c, d, 0);
}
#endif

/* These numbers are the same on all architectures.  Older headers lack them. */
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/* For code that runs between clone and exec on its own stack: the compiler must not insert calls, and the code must not
 * use thread-local memory, where the stack protector has its secret, because the thread that made the process may end
 * before that code does. */
#if defined(__has_attribute)
#if __has_attribute(no_stack_protector)
#define EB_NO_STACK_PROTECTOR , no_stack_protector
#endif
#endif
#ifndef EB_NO_STACK_PROTECTOR
#define EB_NO_STACK_PROTECTOR
#endif
#define EB_BARE __attribute__((no_sanitize("address", "undefined"), noinline EB_NO_STACK_PROTECTOR))

#endif
