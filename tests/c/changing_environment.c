/*
 * Changes the environment while a request is built, after its size is known and before it is copied, as a thread that
 * is not Python's may do.  For tests/test_wire.py.
 */
#include <string.h>

static size_t strlen_then_change(const char *string);
#define strlen strlen_then_change
#include "caller/spawn_frame.c"
#undef strlen

#include "check.h"
#include "spawn/request.h"

static char large[1 << 20];
static char *few[] = {"A=1", "B=2", NULL}, *many[] = {"A=1", "B=2", large, "C=3", NULL};
static char **next;
static int calls;

static size_t strlen_then_change(const char *string)
{
    if (++calls == 2 && next != NULL)
        environ = next;
    return strlen(string);
}

/* Builds a request while the environment changes `from` one `to` another, which the request must contain completely. */
static void check_change(char **from, char **to, uint32_t count)
{
    static const uint8_t options[] = {EB_TAG_EXECUTABLES, 6, 0, 0, 0, 1, 0, 0, 0, 'x', 0,
                                      EB_TAG_ARGV,        6, 0, 0, 0, 1, 0, 0, 0, 'x', 0};
    const struct eb_wanted_fds wanted = {.standard = {-1, -1, -1}};
    struct eb_spawn_frame *frame = eb_spawn_frame_new();
    struct eb_request q;
    char reason[EB_MAX_REASON];
    CHECK(frame != NULL);
    environ = from;
    next = to;
    calls = 0;
    int flags = EB_WITHOUT_STATE | EB_WITH_ENVIRONMENT;
    CHECK(eb_spawn_frame_build(frame, 0, flags, options, sizeof options, &wanted) == 0);
    CHECK(eb_request_parse(&q, frame->frame + EB_HEADER_SIZE, frame->size - EB_HEADER_SIZE, reason) == 0);
    for (uint32_t i = 0; i < count; i++)
        CHECK(strcmp(q.env[i], to[i]) == 0);
    CHECK(q.env[count] == NULL);
    eb_request_free(&q);
    eb_spawn_frame_free(frame);
}

int main(void)
{
    memset(large, 'x', sizeof large - 1);
    check_change(few, few, 2);
    check_change(few, many, 4);
    check_change(many, few, 2);
    puts("good");
    return 0;
}
