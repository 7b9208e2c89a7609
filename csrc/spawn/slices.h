#ifndef EB_SLICES_H
#define EB_SLICES_H

/*
 * Asks for short slices of the CPU: a process with these runs sooner when it is woken on a CPU where a new program has
 * just begun (EEVDF, Linux 6.12; older kernels ignore it).  A fork resets the slices, so commands have the usual ones.
 * It would also reset a negative nice value, so this does nothing with such a value.  Raw system calls only.
 */
void eb_shorten_slices(void);

#endif
