#include "spawn/sandbox.h"

#include "common/rawsys.h"

#if EB_HAVE_RAW

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <sys/socket.h>

/* The same numbers on all architectures; not in the headers of older systems. */
enum { IO_URING_SETUP = 425, LANDLOCK_RESTRICT_SELF = 446 };

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#else
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

enum { X32 = 0x40000000 }; /* from here on, x86-64's numbers are those of another interface */

EB_BARE long eb_restrict_files(int ruleset)
{
    return eb_raw(LANDLOCK_RESTRICT_SELF, ruleset, 0, 0, 0);
}

/* Offsets of an argument's lower half: the kernel takes these as int. */
#define FIELD(name) (uint32_t) offsetof(struct seccomp_data, name)
#define ARGUMENT(n) (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (n))

#define LOAD(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset)
#define GIVE(action) BPF_STMT(BPF_RET | BPF_K, action)
#define SKIP_IF_EQUAL(value, skipped) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skipped, 0)
#define SKIP_UNLESS_EQUAL(value, skipped) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skipped)
#define REFUSE(error) GIVE(SECCOMP_RET_ERRNO | (error))
#define ALLOW GIVE(SECCOMP_RET_ALLOW)

/* clang-format off */
#define CALLS_THAT_HAVE_NO_SOCKET                           \
    LOAD(FIELD(arch)),                                      \
    SKIP_IF_EQUAL(ARCHITECTURE, 1),                         \
    GIVE(SECCOMP_RET_KILL_PROCESS), /* a 32-bit program */  \
    LOAD(FIELD(nr)),                                        \
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, X32, 0, 1),         \
    REFUSE(ENOSYS),                                         \
    SKIP_IF_EQUAL(SYS_keyctl, 3),                           \
    SKIP_IF_EQUAL(SYS_add_key, 2),                          \
    SKIP_IF_EQUAL(SYS_request_key, 1),                      \
    SKIP_UNLESS_EQUAL(IO_URING_SETUP, 1),                   \
    REFUSE(EPERM)

static const struct sock_filter unix_only[] = {
    CALLS_THAT_HAVE_NO_SOCKET,
    SKIP_IF_EQUAL(SYS_socket, 1),
    ALLOW,
    LOAD(ARGUMENT(0)),
    SKIP_UNLESS_EQUAL(AF_UNIX, 1),
    ALLOW,
    REFUSE(EACCES),
};

/* TCP's own sockets, since Landlock knows no others; and no message that connects, since it does not look at those. */
static const struct sock_filter unix_and_tcp[] = {
    CALLS_THAT_HAVE_NO_SOCKET,
    SKIP_IF_EQUAL(SYS_socket, 9),
    SKIP_IF_EQUAL(SYS_sendto, 5),
    SKIP_IF_EQUAL(SYS_sendmmsg, 4),
    SKIP_IF_EQUAL(SYS_sendmsg, 1),
    ALLOW,
    LOAD(ARGUMENT(2)),
    BPF_STMT(BPF_JMP | BPF_JA, 1),
    LOAD(ARGUMENT(3)),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MSG_FASTOPEN, 11, 0),
    ALLOW,
    LOAD(ARGUMENT(0)),
    SKIP_IF_EQUAL(AF_UNIX, 9),
    SKIP_IF_EQUAL(AF_INET, 1),
    SKIP_UNLESS_EQUAL(AF_INET6, 6),
    LOAD(ARGUMENT(1)),
    BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 15), /* without SOCK_CLOEXEC and SOCK_NONBLOCK */
    SKIP_UNLESS_EQUAL(SOCK_STREAM, 3),
    LOAD(ARGUMENT(2)),
    SKIP_IF_EQUAL(IPPROTO_IP, 2),
    SKIP_IF_EQUAL(IPPROTO_TCP, 1),
    REFUSE(EACCES),
    ALLOW,
};
/* clang-format on */

EB_BARE long eb_restrict_sockets(enum eb_sockets sockets)
{
    const bool tcp = sockets == EB_SOCKETS_TCP;
    const struct sock_fprog program = {
        .len = tcp ? sizeof unix_and_tcp / sizeof *unix_and_tcp : sizeof unix_only / sizeof *unix_only,
        /* its type lacks a const */
        .filter = (struct sock_filter *)(uintptr_t)(tcp ? unix_and_tcp : unix_only),
    };
    return eb_raw(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&program, 0);
}

#endif
