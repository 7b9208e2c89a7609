/* The keeper's sources are compiled with this before all else, so that its kernel is the harness's: see fuzz_keeper.c. */
#ifndef FUZZ_KEEPER_H
#define FUZZ_KEEPER_H

#include "fuzz_helper.h"

int fuzz_waitid(idtype_t type, id_t id, siginfo_t *info, int options);

#define waitid fuzz_waitid
#endif
