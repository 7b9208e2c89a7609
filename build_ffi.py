"""The cffi extension ``errand_boy._native``: the protocol's numbers, and csrc/caller.c."""

import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent / "csrc"
SOURCES = ["csrc/wire.c", "csrc/state.c", "csrc/caller.c"]

FUNCTIONS = """
struct eb_caller {
    uint32_t umask, options_size;
    uint8_t options[...];
    uint8_t *environment;
    size_t environment_size;
    ...;
};

struct eb_caller *eb_caller_new(void);
void eb_caller_free(struct eb_caller *c);
int eb_caller_read(struct eb_caller *c, const struct eb_caller *start, int helper, int flags,
                   int fd, uint64_t device, uint64_t inode);
int caller_read_environment(struct eb_caller *c);
int eb_start_helper(int program, const char *path, char **arguments, int control, int *share_fs);
"""

# cffi calls without the GIL, and os.putenv moves the environment under it.
SOURCE = """
#include "caller.h"

static int caller_read_environment(struct eb_caller *c)
{
    PyGILState_STATE state = PyGILState_Ensure();
    int error = eb_caller_read_environment(c);
    PyGILState_Release(state);
    return error;
}
"""


def constants() -> str:
    """Declarations of all constants of wire.h and caller.h, their values left to the C compiler."""
    lines = []
    for header in ("wire.h", "caller.h"):
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
