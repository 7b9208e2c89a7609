/* Has a daemon's helper become its user before it reads a byte from that user. */
#ifndef EB_BECOME_H
#define EB_BECOME_H

#include <stdbool.h>

/*
 * Parses one of these options; false if the argument is another one.
 *
 *   --uid=N, --gid=N  real, effective and saved
 *   --groups=N,...    supplementary groups; several such options add up
 *   --chdir=PATH      the working directory
 */
bool eb_become_option(const char *argument);
/* Applies the options.  Ends the process with a message if that fails.  With `opens`, the user may trace this
 * process afterwards, like a program that the user has executed. */
void eb_become(bool opens);
/* Whether there was a --uid. */
bool eb_has_become(void);

#endif
