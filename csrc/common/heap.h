#ifndef EB_HEAP_H
#define EB_HEAP_H

#include <stdlib.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

/* Gives free memory back to the system, if the C library does not do so by itself. */
static inline void eb_trim_heap(void)
{
#ifdef __GLIBC__
    (void)malloc_trim(0);
#endif
}

#endif
