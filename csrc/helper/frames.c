#include "helper/frames.h"

#include "helper/command.h"
#include "helper/control.h"
#include "helper/streams.h"

static void on_hello(struct eb_connection *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t version = eb_get_u32(&r);
    if (version != EB_VERSION) {
        eb_refuse(c,
                  "this helper speaks version %d of the protocol, not %u: one of the two sides is of an older "
                  "release; restart it",
                  EB_VERSION, (unsigned)version);
        return;
    }
    c->greeted = true;
    eb_channel_consume(&c->channel, EB_HEADER_SIZE + frame->size);
}

/* The states in which a connection takes frames: see connection.h. */
enum { NEW = 1, REST = 2, BUSY = 4, CONTROL = 8 };

static unsigned state_of(const struct eb_connection *c)
{
    return !c->greeted ? NEW : c->control ? CONTROL : eb_is_at_rest(c) ? REST : BUSY;
}

static const struct rule {
    char name[8];
    uint8_t states; /* states in which it may come */
    uint32_t least, most;
    void (*act)(struct eb_connection *c, const struct eb_frame *frame);
} rules[] = {
    [EB_HELLO] = {"HELLO", NEW, 4, 4, on_hello},
    [EB_ADOPT] = {"ADOPT", CONTROL, 0, 5, eb_on_adopt},
    [EB_SPAWN] = {"SPAWN", REST, 0, EB_MAX_FRAME, eb_on_spawn},
    [EB_SIGNAL] = {"SIGNAL", REST | BUSY, 8, 8, eb_on_signal},
    [EB_DRAIN] = {"DRAIN", CONTROL, 0, 0, eb_on_drain},
    [EB_END] = {"END", CONTROL, 1, 1, eb_on_end},
    [EB_QUERY] = {"QUERY", CONTROL, 0, 0, eb_on_query},
    [EB_GRANT] = {"GRANT", CONTROL, 4, 4, eb_on_grant},
    [EB_STDIN] = {"STDIN", REST | BUSY, 0, EB_WINDOW, eb_on_stdin},
    [EB_WINSIZE] = {"WINSIZE", REST | BUSY, 16, 16, eb_on_winsize},
};

/*
 * By now the caller may have fewer rights than this helper, and another process may have got its connections: neither
 * may start anything here.  The kernel reports the sender's real ids, so a process that can regain the rights that it
 * had may still ask.  Input and signals affect only the connection's live command, which could be ended by closing the
 * connection anyway.
 */
static bool may_ask(const struct eb_connection *c, const struct eb_frame *frame)
{
    return !c->foreign || frame->kind == EB_STDIN || frame->kind == EB_WINSIZE || frame->kind == EB_SIGNAL ||
           frame->kind == EB_HELLO;
}

/* Checked as soon as the header has come, so that nobody sends 16 MiB just to be refused. */
static bool is_admitted(struct eb_connection *c, const struct eb_frame *frame)
{
    const struct rule *rule = frame->kind < sizeof rules / sizeof *rules ? &rules[frame->kind] : &rules[0];
    const unsigned state = state_of(c);
    const bool fits = frame->size >= rule->least && frame->size <= rule->most;
    if (state == NEW && (rule->states != NEW || !fits)) {
        eb_refuse(c, "the first frame must be HELLO with a version");
    } else if (state != NEW && (rule->states & ~NEW) == 0) {
        eb_refuse(c, "unknown frame kind %u", (unsigned)frame->kind);
    } else if ((rule->states == CONTROL) != (state == CONTROL) && state != NEW) {
        eb_refuse(c, "%s is not allowed on this connection", rule->name);
    } else if (!fits) {
        eb_refuse(c, "%s with a payload of %u bytes", rule->name, (unsigned)frame->size);
    } else if (!may_ask(c, frame)) {
        eb_refuse(c,
                  "%s from another sender than process %d with user id %u and group id %u, which started this helper",
                  rule->name, (int)helper.caller.pid, (unsigned)helper.caller.uid, (unsigned)helper.caller.gid);
        eb_drain();
    } else if (rule->states & state) {
        return true;
    } else if (c->command != NULL) {
        eb_refuse(c, "%s while this connection's command %d is running", rule->name, (int)c->command->child);
    } else {
        eb_refuse(c, "%s before the end of the last command's output", rule->name);
    }
    return false;
}

bool eb_take_frame(struct eb_connection *c)
{
    struct eb_frame frame = {0};
    if (!c->opened && c->channel.in_size > 0) {
        c->opened = c->channel.in[c->channel.in_at] == 0;
        if (c->opened)
            eb_channel_consume(&c->channel, 1);
        else
            eb_refuse(c, "a framed connection starts with a NUL byte");
        return c->opened;
    }
    int whole = eb_channel_frame(&c->channel, &frame);
    if (whole < 0)
        eb_refuse(c, "a frame of more than %d bytes", EB_MAX_FRAME);
    if (whole < 0 || c->channel.in_size < EB_HEADER_SIZE || !is_admitted(c, &frame) || whole == 0)
        return false;
    c->frame_deadline = 0; /* the next frame has its own */
    rules[frame.kind].act(c, &frame);
    return true;
}
