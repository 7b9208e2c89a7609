#include "keeper/frames.h"

#include "keeper/attach.h"
#include "keeper/command.h"
#include "keeper/follow.h"
#include "keeper/notify.h"

#include <unistd.h>

enum {
    MOST_FDS = 1024,     /* with a SPAWN */
    FRAMES_PER_TURN = 8, /* a FOLLOW may have to search all records */
};

static void on_hello(struct eb_client *c, const struct eb_frame *frame)
{
    struct eb_reader r = eb_reader(frame->payload, frame->size);
    uint32_t version = eb_get_u32(&r);
    if (version != EB_VERSION)
        eb_client_refuse(c,
                         "this job's keeper speaks version %d of the protocol, not %u: one of the two sides is of an "
                         "older release",
                         EB_VERSION, (unsigned)version);
    c->greeted = true;
}

static void on_adopt(struct eb_client *server, const struct eb_frame *frame)
{
    struct eb_fds *fds = &server->channel.fds;
    (void)frame;
    if (fds->count == 0 && fds->lost) {
        eb_fds_clear(fds); /* the peers of dropped descriptors read end-of-file before any HELLO */
        return;
    }
    if (fds->count == 0) {
        eb_client_refuse(server, "ADOPT came without a descriptor");
        return;
    }
    struct eb_client *c = eb_client_new(eb_fds_take(fds), keeper.adopted ? EB_CLIENT_VISITOR : EB_CLIENT_STARTER);
    keeper.adopted = true;
    eb_keeper_wake_by(eb_now_ms()); /* its first turn is in the next round */
    if (c != NULL && eb_client_count(EB_CLIENT_STARTER) + eb_client_count(EB_CLIENT_VISITOR) > EB_MOST_CLIENTS)
        eb_client_refuse(c, "this job has %d connections, which is the limit", EB_MOST_CLIENTS);
}

enum { NEW = 1, SERVER = 2, STARTER = 4, CLIENT = 8 };

/* The roles in which a client may send frames; a starter has the role of a client too, except before its SPAWN. */
static unsigned role_of(const struct eb_client *c)
{
    if (!c->greeted)
        return NEW;
    if (c->kind == EB_CLIENT_SERVER)
        return SERVER;
    return c->kind == EB_CLIENT_STARTER && keeper.state == EB_KEEPER_NEW ? STARTER : CLIENT;
}

static const struct rule {
    char name[8];
    uint8_t roles; /* roles that may send it */
    bool taken;    /* the action itself removes the frame */
    uint32_t least, most;
    void (*act)(struct eb_client *c, const struct eb_frame *frame);
} rules[] = {
    [EB_HELLO] = {"HELLO", NEW, false, 4, 4, on_hello},
    [EB_ADOPT] = {"ADOPT", SERVER, false, 0, 5, on_adopt},
    [EB_NOTIFY] = {"NOTIFY", STARTER, false, 1, EB_MAX_NOTIFY, eb_on_notify},
    [EB_SPAWN] = {"SPAWN", STARTER, true, 0, EB_MAX_FRAME, eb_kept_spawn},
    [EB_SIGNAL] = {"SIGNAL", CLIENT, false, 8, 8, eb_kept_signal},
    [EB_STDIN] = {"STDIN", CLIENT, false, 0, EB_WINDOW, eb_on_typed},
    [EB_WINSIZE] = {"WINSIZE", CLIENT, false, 16, 16, eb_on_window},
    [EB_FOLLOW] = {"FOLLOW", CLIENT, false, 25, 25, eb_on_follow},
    [EB_ATTACH] = {"ATTACH", CLIENT, false, 17, 17, eb_on_attach},
};

/* Checked as soon as the header has come, so that nobody sends 16 MiB just to be refused. */
static bool is_admitted(struct eb_client *c, const struct eb_frame *frame)
{
    const struct rule *rule = frame->kind < sizeof rules / sizeof *rules ? &rules[frame->kind] : &rules[0];
    const unsigned role = role_of(c);
    const bool fits = frame->size >= rule->least && frame->size <= rule->most;
    if (role == NEW && (rule->roles != NEW || !fits))
        eb_client_refuse(c, "the first frame must be HELLO with a version");
    else if ((rule->roles & ~(unsigned)NEW) == 0 && role != NEW)
        eb_client_refuse(c, "unknown frame kind %u", (unsigned)frame->kind);
    else if (!(rule->roles & role))
        eb_client_refuse(c, "%s is not allowed on this connection%s", rule->name,
                         role == STARTER ? " before SPAWN" : "");
    else if (!fits)
        eb_client_refuse(c, "%s with a payload of %u bytes", rule->name, (unsigned)frame->size);
    else
        return true;
    return false;
}

bool eb_client_takes_frames(const struct eb_client *c)
{
    return !c->closing && !c->broken && !c->gone && !eb_client_is_blocked(c) &&
           !(c->kind == EB_CLIENT_STARTER && keeper.state == EB_KEEPER_STARTING);
}

static bool take_frame(struct eb_client *c)
{
    struct eb_channel *in = &c->channel;
    struct eb_frame frame = {0};
    if (!c->opened && in->in_size > 0) {
        c->opened = in->in[in->in_at] == 0;
        if (c->opened)
            eb_channel_consume(in, 1);
        else
            eb_client_refuse(c, "a framed connection starts with a NUL byte");
        return c->opened;
    }
    int whole = eb_channel_frame(in, &frame);
    if (whole < 0)
        eb_client_refuse(c, "a frame of more than %d bytes", EB_MAX_FRAME);
    if (whole < 0 || in->in_size < EB_HEADER_SIZE || !is_admitted(c, &frame) || whole == 0)
        return false;
    const struct rule *rule = &rules[frame.kind];
    c->deadline = 0; /* the next frame has its own */
    rule->act(c, &frame);
    if (!rule->taken)
        eb_channel_consume(in, EB_HEADER_SIZE + frame.size);
    return true;
}

/* Only ADOPT and SPAWN may come with descriptors. */
static void check_fds(struct eb_client *c)
{
    const struct eb_fds *fds = &c->channel.fds;
    const bool may = role_of(c) == SERVER || role_of(c) == STARTER;
    if (fds->count > 0 && (!may || c->channel.in_size == 0))
        eb_client_refuse(c, "%u descriptors that no frame names", (unsigned)fds->count);
    else if (fds->count > MOST_FDS)
        eb_client_refuse(c, "more than %d descriptors", MOST_FDS);
}

bool eb_client_take_frames(struct eb_client *c)
{
    for (int i = 0; eb_client_takes_frames(c) && take_frame(c); i++)
        if (i == FRAMES_PER_TURN)
            return true;
    if (eb_client_takes_frames(c))
        check_fds(c);
    return false;
}
