/* Landlock rulesets, by system calls, because C libraries have no functions for them. */
#ifndef EB_LANDLOCK_H
#define EB_LANDLOCK_H

#include <stdint.h>

/* The version of the kernel's interface, from 1; or -errno if there is none (ENOSYS) or it is off (EOPNOTSUPP). */
int eb_landlock_version(void);

/* A close-on-exec descriptor of a ruleset that refuses these rights and scopes, except by rules; or -errno. */
int eb_landlock_create(uint64_t files, uint64_t network, uint64_t scopes);

/* Allows rights beneath the directory, or on the file, that is open as `fd`.  Returns 0 or -errno. */
int eb_landlock_allow_path(int ruleset, int fd, uint64_t rights);

/* Allows rights for a TCP port. */
int eb_landlock_allow_port(int ruleset, uint64_t port, uint64_t rights);

#endif
