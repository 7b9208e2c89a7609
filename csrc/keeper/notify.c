#include "keeper/notify.h"

#include "owner/stdio.h"
#include "keeper/journal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ADDED = 2 };

static uint8_t *bytes; /* the request, or NULL */
static uint32_t bytes_size;
static struct eb_request request;
static char **environment;
static char texts[ADDED][48];
static struct eb_start start;
static bool starting;

void eb_on_notify(struct eb_client *c, const struct eb_frame *frame)
{
    char reason[EB_MAX_REASON];
    int error = eb_request_parse(&request, frame->payload, frame->size, reason);
    if (bytes != NULL)
        eb_client_refuse(c, "a second NOTIFY");
    else if (error < 0)
        eb_client_refuse(c, "malformed NOTIFY: %s", reason);
    else if (request.streams != 0 || eb_request_fds(&request) != 0 || eb_has(&request, EB_TAG_SUPERVISE) ||
             eb_has(&request, EB_TAG_COALESCE))
        eb_client_refuse(c, "malformed NOTIFY: descriptors, STREAMS, SUPERVISE and COALESCE are not allowed");
    else if (error > 0 || (bytes = malloc(frame->size)) == NULL)
        eb_client_refuse(c, "out of memory");
    else
        memcpy(bytes, frame->payload, bytes_size = frame->size);
    eb_request_free(&request);
}

static void finish(int error)
{
    if (error != 0)
        (void)eb_journal_add("{\"notify_errno\": %d}", error);
    if (!start.still_read) {
        eb_request_free(&request);
        free(environment);
        free(bytes);
    }
    bytes = NULL;
}

static bool is_told(const char *entry)
{
    for (int i = 0; i < ADDED; i++)
        if (strncmp(entry, texts[i], strcspn(texts[i], "=") + 1) == 0)
            return true;
    return false;
}

/* Adds to its environment what it must be told. */
static bool extend(int status, const char *cause)
{
    size_t count = 0;
    while (request.env != NULL && request.env[count] != NULL)
        count++;
    environment = calloc(count + ADDED + 1, sizeof *environment);
    if (environment == NULL)
        return false;
    (void)snprintf(texts[0], sizeof texts[0], "ERRAND_BOY_STATUS=%d", status);
    (void)snprintf(texts[1], sizeof texts[1], "ERRAND_BOY_CAUSE=%s", cause);
    size_t size = 0;
    for (size_t i = 0; i < count; i++)
        if (!is_told(request.env[i]))
            environment[size++] = request.env[i];
    for (int i = 0; i < ADDED; i++)
        environment[size++] = texts[i];
    request.env = environment;
    return true;
}

void eb_notify_begin(int status, const char *cause)
{
    const struct eb_fds none = {0};
    const int theirs[3] = {-1, -1, -1};
    char reason[EB_MAX_REASON];
    if (bytes == NULL)
        return;
    if (eb_request_parse(&request, bytes, bytes_size, reason) != 0 || !extend(status, cause)) {
        finish(ENOMEM);
        return;
    }
    request.present |= (uint64_t)1 << EB_TAG_ENV | (uint64_t)1 << EB_TAG_SIGMASK | (uint64_t)1 << EB_TAG_SIGIGN;
    eb_stdio_place(&request, &none, theirs, keeper.null_fd);
    eb_self_complete(&keeper.self, &request);
    starting = true;
    keeper.spawner->begin(&start, &request, false);
    if (start.done_fd < 0)
        eb_notify_started();
}

int eb_notify_fd(void)
{
    return starting ? start.done_fd : -1;
}

void eb_notify_started(void)
{
    keeper.spawner->end(&start);
    starting = false;
    finish(start.error);
}
