"""The cffi extension ``errand_boy._native``: the protocol's numbers, and the caller's side in C."""

import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent / "csrc"
SOURCES = [
    f"csrc/{name}.c"
    for name in (
        "common/wire",
        "common/state",
        "spawn/places",
        "spawn/rawclone",
        "spawn/request",
        "spawn/sandbox",
        "spawn/spawn_child",
        "spawn/child_capabilities",
        "spawn/spawn_job",
        "caller/caller",
        "caller/spawn_frame",
        "caller/landlock",
        "caller/launch",
        "caller/direct",
        "caller/direct_child",
        "caller/module",
    )
]
HEADERS = (
    "common/wire.h",
    "common/ringfile.h",
    "caller/caller.h",
    "caller/spawn_frame.h",
    "caller/direct.h",
)

FUNCTIONS = """
struct eb_caller {
    uint32_t umask;
    ...;
};

struct eb_spawn_frame {
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
struct eb_spawn_frame *eb_spawn_frame_new(void);
void eb_spawn_frame_free(struct eb_spawn_frame *o);
void eb_spawn_frame_done(struct eb_spawn_frame *o);
int eb_send_request(struct eb_spawn_frame *o, const struct eb_caller *start, int helper, int flags,
                    int fd, uint64_t device, uint64_t inode, const uint8_t *options,
                    size_t options_size, int in, int out, int err, const int *others,
                    uint32_t other_count, const int *carried, uint32_t carried_count);
#define EB_HAVE_RAW ...
bool eb_direct_works(void);
int eb_await_readable(int fd);
void eb_close_all(const int *fds, const uint8_t *unread, size_t count);
void eb_trim_heap(void);
int getsockopt(int sockfd, int level, int name, void *value, unsigned int *size);
int prctl(int option, ...);
unsigned long getauxval(unsigned long type);
int eb_landlock_version(void);
int eb_landlock_create(uint64_t files, uint64_t network, uint64_t scopes);
int eb_landlock_allow_path(int ruleset, int fd, uint64_t rights);
int eb_landlock_allow_port(int ruleset, uint64_t port, uint64_t rights);
int eb_start_helper(int program, const char *path, char **arguments, int control, int errors,
                    int *share_fs, const char **step);
"""


def constants() -> str:
    """Declarations of all constants of the HEADERS, their values left to the C compiler."""
    lines = []
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/", "", (CSRC / header).read_text(), flags=re.DOTALL)
        lines += re.findall(
            r"^#define (EB_[A-Z_]+) (?:\d+|0x[0-9A-F]+u) *$", text, flags=re.MULTILINE
        )
        for body in re.findall(r"^enum(?: \w+)? \{(.*?)\}", text, flags=re.DOTALL | re.MULTILINE):
            lines += re.findall(r"\b(EB_[A-Z_]+)\b(?=\s*[=,\n])", body)
    return "".join(f"#define {name} ...\n" for name in lines)


ffibuilder = FFI()
ffibuilder.cdef(constants() + FUNCTIONS)
ffibuilder.set_source(
    "errand_boy._native",
    "#define PyInit__native eb_init_by_cffi\n"  # csrc/caller/module.c has the one that Python calls
    '#include "caller/direct.h"\n#include "caller/landlock.h"\n#include "caller/launch.h"\n'
    '#include "caller/module.h"\n#include "common/ringfile.h"\n'
    '#include "common/heap.h"\n#include "common/rawsys.h"\n'
    "#include <sys/auxv.h>\n#include <sys/prctl.h>\n#include <sys/socket.h>\n",
    sources=SOURCES,
    depends=sorted(str(path.relative_to(CSRC.parent)) for path in CSRC.rglob("*.h")),
    include_dirs=["csrc"],
    # The second as in Python.h, which only some of the sources include.
    define_macros=[("_GNU_SOURCE", None), ("_FILE_OFFSET_BITS", "64")],
    # A new process that shares the caller's memory must not run the dynamic linker.
    extra_compile_args=["-std=c11", "-fvisibility=hidden"],
    extra_link_args=["-Wl,-z,relro,-z,now"],
)

if __name__ == "__main__":
    print(constants())
