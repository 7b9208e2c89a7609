/* Starts the private helper. */
#ifndef EB_LAUNCH_H
#define EB_LAUNCH_H

/*
 * Starts the program behind the O_PATH descriptor `program`, or if that is -1 `path`, as a helper whose descriptor 3 is
 * `control` and whose standard error is `errors`, with the NULL-terminated `arguments`.  The calling process is not
 * copied.  With `*share_fs`, the helper shares this process's working directory, root and umask; `*share_fs` is cleared
 * if the kernel refuses that, or if this thread's real, effective and saved ids differ.  Returns the helper's pid, or
 * -errno, with the name of the system call that failed in `*step`.
 */
int eb_start_helper(int program, const char *path, char **arguments, int control, int errors, int *share_fs,
                    const char **step);

#endif
