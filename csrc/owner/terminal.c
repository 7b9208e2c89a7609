#include "owner/terminal.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>

/* The command gets it in blocking mode.  Opening it does not make it anybody's controlling terminal. */
static int open_theirs(int ours)
{
    int locked = 0;
    if (ioctl(ours, TIOCSPTLCK, &locked) != 0)
        return -1;
    return ioctl(ours, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

static bool set_up(const struct eb_request *q, int theirs)
{
    struct termios t;
    if (ioctl(theirs, TIOCSWINSZ, &q->size) != 0)
        return false;
    if (q->terminal == 0)
        return true;
    if (tcgetattr(theirs, &t) != 0)
        return false;
    if (q->terminal & EB_RAW)
        cfmakeraw(&t);
    if (q->terminal & EB_NO_ECHO)
        t.c_lflag &= ~(tcflag_t)ECHO;
    return tcsetattr(theirs, TCSANOW, &t) == 0;
}

bool eb_terminal_open(const struct eb_request *q, int ours[2], int theirs[2])
{
    return (ours[1] = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK)) >= 0 &&
           (ours[0] = fcntl(ours[1], F_DUPFD_CLOEXEC, 0)) >= 0 && (theirs[1] = open_theirs(ours[1])) >= 0 &&
           (theirs[0] = fcntl(theirs[1], F_DUPFD_CLOEXEC, 0)) >= 0 && set_up(q, theirs[0]);
}

void eb_terminal_resize(int fd, const uint8_t *payload, size_t size)
{
    struct eb_reader r = eb_reader(payload, size);
    struct winsize w = {0};
    w.ws_row = (unsigned short)eb_get_u32(&r);
    w.ws_col = (unsigned short)eb_get_u32(&r);
    w.ws_xpixel = (unsigned short)eb_get_u32(&r);
    w.ws_ypixel = (unsigned short)eb_get_u32(&r);
    (void)ioctl(fd, TIOCSWINSZ, &w); /* fails if the terminal has gone */
}

uint32_t eb_terminal_end(int fd, uint8_t last, uint8_t keys[EB_MOST_KEYS])
{
    struct termios t;
    uint32_t n = 0;
    if (tcgetattr(fd, &t) != 0 || !(t.c_lflag & ICANON) || t.c_cc[VEOF] == 0)
        return 0;
    if (last != '\n')
        keys[n++] = t.c_cc[VEOF]; /* first sends the line that has been begun */
    keys[n++] = t.c_cc[VEOF];
    return n;
}
