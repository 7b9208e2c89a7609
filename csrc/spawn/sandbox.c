#include "spawn/sandbox.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* These numbers are the same on all architectures; older headers lack them. */
enum { IO_URING_SETUP = 425, LANDLOCK_RESTRICT_SELF = 446 };

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#else
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

enum {
    X32 = 0x40000000, /* from this number on, x86-64's calls belong to another interface */
    IOCTL_32 = 54,    /* of 32-bit programs, on both */
};

/* Requests that type on a terminal: whoever reads from it, outside, takes that for the user's input. */
#ifndef TIOCLINUX
#define TIOCLINUX 0x541C
#endif

EB_BARE long eb_restrict_files(int ruleset)
{
    return eb_raw(LANDLOCK_RESTRICT_SELF, ruleset, 0, 0, 0);
}

/* Offsets of an argument's lower half, because the kernel takes these arguments as int; the upper may be anything. */
#define FIELD(name) (uint32_t)offsetof(struct seccomp_data, name)
#define ARGUMENT(n) (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (n))

#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset)
#define GIVE(action) BPF_STMT(BPF_RET | BPF_K, action)
/* These skip `yes` instructions if the condition holds, and `no` if it does not. */
#define IF_EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no)
#define IF_LEAST(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, value, yes, no)
#define IF_SET(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, value, yes, no)
#define REFUSE GIVE(SECCOMP_RET_ERRNO | EACCES)
#define ALLOW GIVE(SECCOMP_RET_ALLOW)

/* The calls for keyrings have three successive numbers, between those of the calls for sockets.  When a filter is
 * installed, the kernel runs it once for each system call number, so it should do little for most of them. */
_Static_assert(SYS_request_key == SYS_add_key + 1 && SYS_keyctl == SYS_add_key + 2, "the order of the filters");
_Static_assert(SYS_ioctl < SYS_add_key && SYS_socket < SYS_add_key && SYS_socketpair < SYS_add_key &&
                   SYS_sendto < SYS_add_key && SYS_sendmsg < SYS_add_key && SYS_sendmmsg > SYS_keyctl,
               "the order of the filters");

static const struct sock_filter unix_only[] = {
    LOAD(FIELD(arch)),
    IF_EQUAL(ARCHITECTURE, 1, 0),
    GIVE(SECCOMP_RET_KILL_PROCESS), /* a 32-bit program, whose calls have other numbers */
    LOAD(FIELD(nr)),
    IF_LEAST(SYS_add_key, 9, 0),
    IF_EQUAL(SYS_ioctl, 3, 0),
    IF_EQUAL(SYS_socket, 5, 0),
    IF_EQUAL(SYS_socketpair, 4, 0),
    ALLOW,
    LOAD(ARGUMENT(1)), /* of ioctl */
    IF_EQUAL(TIOCSTI, 7, 0),
    IF_EQUAL(TIOCLINUX, 6, 5),
    LOAD(ARGUMENT(0)), /* of socket and socketpair */
    IF_EQUAL(AF_UNIX, 3, 4),
    IF_LEAST(SYS_keyctl + 1, 0, 3),
    IF_EQUAL(IO_URING_SETUP, 2, 0),
    IF_LEAST(X32, 1, 0),
    ALLOW,
    REFUSE,
};

/* Only TCP sockets, because Landlock knows no others; and no message that connects, because Landlock does not check
 * that. */
static const struct sock_filter unix_and_tcp[] = {
    LOAD(FIELD(arch)),
    IF_EQUAL(ARCHITECTURE, 1, 0),
    GIVE(SECCOMP_RET_KILL_PROCESS),
    LOAD(FIELD(nr)),
    IF_LEAST(SYS_add_key, 23, 0),
    IF_EQUAL(SYS_ioctl, 5, 0),
    IF_EQUAL(SYS_socket, 7, 0),
    IF_EQUAL(SYS_socketpair, 6, 0),
    IF_EQUAL(SYS_sendto, 17, 0),
    IF_EQUAL(SYS_sendmsg, 14, 0),
    ALLOW,
    LOAD(ARGUMENT(1)), /* of ioctl */
    IF_EQUAL(TIOCSTI, 22, 0),
    IF_EQUAL(TIOCLINUX, 21, 20),
    LOAD(ARGUMENT(0)), /* of socket and socketpair */
    IF_EQUAL(AF_UNIX, 18, 0),
    IF_EQUAL(AF_INET, 1, 0),
    IF_EQUAL(AF_INET6, 0, 17),
    LOAD(ARGUMENT(1)),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 15), /* without SOCK_CLOEXEC and SOCK_NONBLOCK */
    IF_EQUAL(SOCK_STREAM, 0, 14),
    LOAD(ARGUMENT(2)),
    IF_EQUAL(IPPROTO_IP, 11, 0),
    IF_EQUAL(IPPROTO_TCP, 10, 11),
    LOAD(ARGUMENT(2)), /* of sendmsg */
    BPF_STMT(BPF_JMP | BPF_JA, 1),
    LOAD(ARGUMENT(3)), /* of sendto */
    IF_SET(MSG_FASTOPEN, 7, 6),
    IF_LEAST(SYS_keyctl + 1, 0, 6),
    IF_EQUAL(SYS_sendmmsg, 2, 0),
    IF_EQUAL(IO_URING_SETUP, 4, 0),
    IF_LEAST(X32, 3, 2),
    LOAD(ARGUMENT(3)), /* of sendmmsg */
    IF_SET(MSG_FASTOPEN, 1, 0),
    ALLOW,
    REFUSE,
};

/* Only typing is refused, to 32-bit programs too; and all x32 calls, as above. */
static const struct sock_filter any[] = {
    LOAD(FIELD(arch)),
    IF_EQUAL(ARCHITECTURE, 2, 0),
    LOAD(FIELD(nr)),
    IF_EQUAL(IOCTL_32, 3, 6),
    LOAD(FIELD(nr)),
    IF_EQUAL(SYS_ioctl, 1, 0),
    IF_LEAST(X32, 4, 3),
    LOAD(ARGUMENT(1)),
    IF_EQUAL(TIOCSTI, 2, 0),
    IF_EQUAL(TIOCLINUX, 1, 0),
    ALLOW,
    REFUSE,
};

#define FILTER(array) {array, sizeof(array) / sizeof *(array)}

static const struct {
    const struct sock_filter *lines;
    unsigned short count;
} filters[] = {
    [EB_SOCKETS_UNIX] = FILTER(unix_only),
    [EB_SOCKETS_TCP] = FILTER(unix_and_tcp),
    [EB_SOCKETS_ANY] = FILTER(any),
};

EB_BARE long eb_restrict_sockets(enum eb_sockets sockets)
{
    const struct sock_fprog program = {
        .len = filters[sockets].count,
        .filter = (struct sock_filter *)(uintptr_t)filters[sockets].lines, /* its type lacks a const */
    };
    return eb_raw(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&program, 0);
}

#endif
