#ifndef EB_SLICES_H
#define EB_SLICES_H

/*
 * Asks for short slices of the CPU: with these, a process runs sooner when it is woken on a CPU where a new program has
 * just begun (EEVDF, Linux 6.12; older kernels ignore this).  A fork resets the slices, so commands have the usual
 * ones. A fork would also reset a negative nice value, so this function does nothing if the process has one.  Raw
 * system calls only.
 */
void eb_shorten_slices(void);

#endif
