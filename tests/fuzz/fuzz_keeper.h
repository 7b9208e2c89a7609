/* Included first when the keeper's sources are compiled, so that the harness replaces the kernel: see fuzz_keeper.c. */
#ifndef FUZZ_KEEPER_H
#define FUZZ_KEEPER_H

#include "fuzz_helper.h"

int fuzz_waitid(idtype_t type, id_t id, siginfo_t *info, int options);

#define waitid fuzz_waitid
#endif
