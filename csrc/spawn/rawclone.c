#include "spawn/rawclone.h"

#if defined(__x86_64__)

#define EB_ENTER_CHILD      \
    "syscall\n\t"           \
    "test %%rax, %%rax\n\t" \
    "jnz 1f\n\t"            \
    "xor %%ebp, %%ebp\n\t"  \
    "mov %%r13, %%rdi\n\t"  \
    "call *%%r12\n\t"       \
    "ud2\n"                 \
    "1:"

EB_BARE long eb_raw_clone3(struct eb_clone_args *args, int (*child)(void *), void *arg)
{
    long result;
    register int (*r12)(void *) __asm__("r12") = child;
    register void *r13 __asm__("r13") = arg;
    __asm__ volatile(EB_ENTER_CHILD
                     : "=a"(result)
                     : "a"((long)SYS_clone3), "D"(args), "S"(sizeof *args), "r"(r12), "r"(r13)
                     : "rcx", "r11", "memory");
    return result;
}

EB_BARE long eb_raw_clone(unsigned long flags, void *stack, volatile pid_t *parent_tid, volatile pid_t *tid,
                          int (*child)(void *), void *arg)
{
    long result;
    register volatile pid_t *r10 __asm__("r10") = tid;
    register long r8 __asm__("r8") = 0;
    register int (*r12)(void *) __asm__("r12") = child;
    register void *r13 __asm__("r13") = arg;
    __asm__ volatile(EB_ENTER_CHILD
                     : "=a"(result)
                     : "a"((long)SYS_clone), "D"(flags), "S"(stack), "d"(parent_tid), "r"(r10), "r"(r8), "r"(r12),
                       "r"(r13)
                     : "rcx", "r11", "memory");
    return result;
}

#elif defined(__aarch64__)

#define EB_ENTER_CHILD \
    "svc 0\n\t"        \
    "cbnz x0, 1f\n\t"  \
    "mov x29, xzr\n\t" \
    "mov x0, x21\n\t"  \
    "blr x20\n\t"      \
    "brk 0\n"          \
    "1:"

EB_BARE long eb_raw_clone3(struct eb_clone_args *args, int (*child)(void *), void *arg)
{
    register long x8 __asm__("x8") = SYS_clone3;
    register long x0 __asm__("x0") = (long)args;
    register long x1 __asm__("x1") = sizeof *args;
    register int (*x20)(void *) __asm__("x20") = child;
    register void *x21 __asm__("x21") = arg;
    __asm__ volatile(EB_ENTER_CHILD : "+r"(x0) : "r"(x8), "r"(x1), "r"(x20), "r"(x21) : "memory", "cc");
    return x0;
}

EB_BARE long eb_raw_clone(unsigned long flags, void *stack, volatile pid_t *parent_tid, volatile pid_t *tid,
                          int (*child)(void *), void *arg)
{
    register long x8 __asm__("x8") = SYS_clone;
    register long x0 __asm__("x0") = (long)flags;
    register void *x1 __asm__("x1") = stack;
    register volatile pid_t *x2 __asm__("x2") = parent_tid;
    register long x3 __asm__("x3") = 0;
    register volatile pid_t *x4 __asm__("x4") = tid;
    register int (*x20)(void *) __asm__("x20") = child;
    register void *x21 __asm__("x21") = arg;
    __asm__ volatile(EB_ENTER_CHILD
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x20), "r"(x21)
                     : "memory", "cc");
    return x0;
}

#endif

#undef EB_ENTER_CHILD
