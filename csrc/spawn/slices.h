#ifndef EB_SLICES_H
#define EB_SLICES_H

/*
 * Asks for short slices of the CPU: who is woken on a CPU where a new program has just begun runs sooner then (EEVDF,
 * Linux 6.12; older kernels take no notice).  A fork resets it, so commands have what is usual; one would reset a
 * negative nice value as well, so not with such a value.  Raw system calls only.
 */
void eb_shorten_slices(void);

#endif
