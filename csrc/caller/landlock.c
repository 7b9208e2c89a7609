#include "caller/landlock.h"

#include "common/descriptor.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

/* These numbers are the same on all architectures; older headers lack them. */
enum {
    CREATE_RULESET = 444,
    ADD_RULE = 445,
    CREATE_VERSION = 1,
    PATH_BENEATH = 1,
    NET_PORT = 2,
};

struct ruleset {
    uint64_t files, network, scopes; /* an older kernel accepts members that it does not know if they are 0 */
};

struct path_beneath {
    uint64_t rights;
    int32_t fd;
} __attribute__((packed));

struct net_port {
    uint64_t rights, port;
};

static int result(long value)
{
    return value < 0 ? -errno : (int)value;
}

int eb_landlock_version(void)
{
    return result(syscall(CREATE_RULESET, NULL, 0, CREATE_VERSION));
}

int eb_landlock_create(uint64_t files, uint64_t network, uint64_t scopes)
{
    const struct ruleset ruleset = {.files = files, .network = network, .scopes = scopes};
    return result(eb_above_standard((int)syscall(CREATE_RULESET, &ruleset, sizeof ruleset, 0)));
}

int eb_landlock_allow_path(int ruleset, int fd, uint64_t rights)
{
    const struct path_beneath rule = {.rights = rights, .fd = fd};
    return result(syscall(ADD_RULE, ruleset, PATH_BENEATH, &rule, 0));
}

int eb_landlock_allow_port(int ruleset, uint64_t port, uint64_t rights)
{
    const struct net_port rule = {.rights = rights, .port = port};
    return result(syscall(ADD_RULE, ruleset, NET_PORT, &rule, 0));
}
