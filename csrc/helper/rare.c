/* This function is linked before the rare code: see setup.py. */
#include "helper/rare.h"

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OWN_SIZE = 256 }; /* at most as many bytes as this function has, which must not be dropped while it runs */

void eb_drop_rare_text(void)
{
    extern char etext[]; /* the end of the code, from the linker */
    const uintptr_t page = (uintptr_t)getpagesize();
    uintptr_t start = ((uintptr_t)eb_drop_rare_text + OWN_SIZE + page - 1) & ~(page - 1);
    uintptr_t end = (uintptr_t)etext & ~(page - 1);
    if (start < end)
        (void)madvise((void *)start, end - start, MADV_DONTNEED);
}
