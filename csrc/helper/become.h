/* Whose a daemon's helper is: it becomes that user before it reads a byte of theirs. */
#ifndef EB_BECOME_H
#define EB_BECOME_H

#include <stdbool.h>

/*
 * Takes one of these options; false: it is none of them.
 *
 *   --uid=N, --gid=N  real, effective and saved
 *   --groups=N,...    the supplementary groups; those of several such options together
 *   --chdir=PATH      the working directory
 */
bool eb_become_option(const char *argument);
/* Does what they say.  Ends the process with a message if any of it fails.  With `opens` the user may look into this
 * process then, as into a program that he has executed. */
void eb_become(bool opens);
/* Whether there was a --uid. */
bool eb_has_become(void);

#endif
