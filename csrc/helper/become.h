/* The user of a daemon's helper, which becomes that user before it reads a byte from them. */
#ifndef EB_BECOME_H
#define EB_BECOME_H

#include <stdbool.h>

/*
 * Parses one of these options; false if it is another.
 *
 *   --uid=N, --gid=N  real, effective and saved
 *   --groups=N,...    the supplementary groups; those of several such options together
 *   --chdir=PATH      the working directory
 */
bool eb_become_option(const char *argument);
/* Applies them.  Ends the process with a message if that fails.  With `opens`, the user may trace this process
 * afterwards, like a program that the user has executed. */
void eb_become(bool opens);
/* Whether there was a --uid. */
bool eb_has_become(void);

#endif
