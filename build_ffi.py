"""The cffi extension ``errand_boy._native``: the protocol's numbers, and the caller's side in C."""

import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent / "csrc"
SOURCES = [f"csrc/{name}.c" for name in ("wire", "state", "caller", "outgoing", "launch")]
HEADERS = ("wire.h", "caller.h", "outgoing.h")

FUNCTIONS = """
struct eb_caller {
    uint32_t umask;
    ...;
};

struct eb_outgoing {
    struct eb_caller caller;
    uint8_t *frame;
    size_t size, sent;
    int *fds;
    uint32_t fd_count;
    ...;
};

struct eb_caller *eb_caller_new(void);
void eb_caller_free(struct eb_caller *c);
void eb_caller_close(struct eb_caller *c);
int eb_caller_read(struct eb_caller *c, const struct eb_caller *start, int helper, int flags,
                   int fd, uint64_t device, uint64_t inode);
struct eb_outgoing *eb_outgoing_new(void);
void eb_outgoing_free(struct eb_outgoing *o);
void eb_outgoing_done(struct eb_outgoing *o);
int outgoing_prepare(struct eb_outgoing *o, const struct eb_caller *start, int helper, int flags,
                     int fd, uint64_t device, uint64_t inode, const uint8_t *options,
                     size_t options_size, int in, int out, int err, const int *others,
                     uint32_t other_count);
int eb_start_helper(int program, const char *path, char **arguments, int control, int *share_fs);
"""

SOURCE = """
#include "launch.h"
#include "outgoing.h"

/*
 * Reads the calling thread's state; if the helper that `start` belongs to fits it, or without one,
 * builds the request; and if `fd` still is a connection to it, sends that. One call, since each one
 * lets go of the GIL and waits for it. Returns what was found, or -errno.
 */
static int outgoing_prepare(struct eb_outgoing *o, const struct eb_caller *start, int helper,
                            int flags, int fd, uint64_t device, uint64_t inode,
                            const uint8_t *options, size_t options_size, int in, int out, int err,
                            const int *others, uint32_t other_count)
{
    const struct eb_wanted_fds wanted = {
        .standard = {in, out, err}, .others = others, .other_count = other_count};
    int found = eb_caller_read(&o->caller, start, helper, flags, fd, device, inode);
    if (found < 0 || (start != NULL && !(found & EB_FITS)))
        return found;
    PyGILState_STATE state = 0;
    if (flags & EB_WITH_ENVIRONMENT)
        state = PyGILState_Ensure();
    int error = eb_outgoing_build(o, found, flags, options, options_size, &wanted);
    if (flags & EB_WITH_ENVIRONMENT)
        PyGILState_Release(state);
    if (error != 0)
        return -error;
    if (found & EB_CONNECTION && !(found & EB_UNSURE))
        eb_outgoing_send(o, fd);
    if (o->sent < o->size)
        return found;
    eb_outgoing_done(o);
    return found | EB_SENT;
}
"""


def constants() -> str:
    """Declarations of all constants of the HEADERS, their values left to the C compiler."""
    lines = []
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/", "", (CSRC / header).read_text(), flags=re.DOTALL)
        lines += re.findall(r"^#define (EB_[A-Z_]+) \d+$", text, flags=re.MULTILINE)
        for body in re.findall(r"^enum(?: \w+)? \{(.*?)\}", text, flags=re.DOTALL | re.MULTILINE):
            lines += re.findall(r"\b(EB_[A-Z_]+)\b(?=\s*[=,\n])", body)
    return "".join(f"#define {name} ...\n" for name in lines)


ffibuilder = FFI()
ffibuilder.cdef(constants() + FUNCTIONS)
ffibuilder.set_source(
    "errand_boy._native",
    SOURCE,
    sources=SOURCES,
    include_dirs=["csrc"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-std=c11"],
)

if __name__ == "__main__":
    print(constants())
