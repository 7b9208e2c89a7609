/* Writes text for /proc between clone and exec, so without the C library.  For C files that call all of these
 * functions. */
#ifndef EB_RAWTEXT_H
#define EB_RAWTEXT_H

#include "common/rawsys.h"

/* Both return the number of bytes written, without a NUL. */
static EB_BARE int eb_write_text(char *at, const char *text)
{
    int size = 0;
    for (; text[size] != '\0'; size++)
        at[size] = text[size];
    return size;
}

static EB_BARE int eb_write_number(char *at, unsigned number)
{
    char digits[10];
    int count = 0, size = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    while (count > 0)
        at[size++] = digits[--count];
    return size;
}

#endif
