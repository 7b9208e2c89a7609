"""The stream engine: every event, with its bytes in any pieces, and a loss at every point."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from io import BytesIO
from random import Random
from typing import Any

import pytest
from wire import NOT_FOUND, USAGE, exited, frame, signal_frame, spawned, u32

from errand_boy._native import lib
from errand_boy._wire import frames
from errand_boy._wire.frames import Failed
from errand_boy._wire.stream import Ended, Lost, Output, Started, Stream
from errand_boy.errors import HelperDiedError, ProtocolError, RefusedError

BOTH = 0b110
ALL = 0b111
REQUEST = frames.frame(lib.EB_SPAWN, [b"whatever"])


def credit(size: int) -> bytes:
    return frame(lib.EB_CREDIT, u32(size))


def stdin(data: bytes = b"") -> bytes:
    return frame(lib.EB_STDIN, data)


OUT_END, ERR_END = frame(lib.EB_STDOUT), frame(lib.EB_STDERR)
UNREAD = frame(lib.EB_UNREAD)
BRIEF_END = exited(0, struct.pack("<QiB", 1234, 77, 1))

CONVERSATION = [
    frames.HELLO,
    spawned(),
    frame(lib.EB_STDOUT, b"out"),
    frame(lib.EB_STDERR, b"err"),
    credit(3),
    frame(lib.EB_STDOUT, bytes(700)),
    ERR_END,
    exited(0x300),
    frame(lib.EB_STDOUT, b"late"),
    OUT_END,
]
TOLD = [
    ("started", 77),
    ("output", 0, b"out"),
    ("output", 1, b"err"),
    ("output", 0, bytes(700)),
    ("output", 0, b"late"),
    ("ended", 3, USAGE, None),
]


def begun(
    streams: int = BOTH, *, brief: bool = False, input: bytes | None = None, greeted: bool = False
) -> Stream:
    stream = Stream(greeted)
    stream.begin(streams, brief, REQUEST, None if input is None else BytesIO(input))
    return stream


def send(stream: Stream) -> bytes:
    data = stream.unsent
    stream.count_sent(len(data))
    return data


def told(events: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for event in events:
        if isinstance(event, Started):
            found.append(("started", event.pid))
        elif isinstance(event, Output):
            found.append(("output", event.number, event.data))
        elif isinstance(event, Ended):
            found.append(("ended", event.returncode, event.usage, event.brief))
        elif isinstance(event, Failed):
            found.append(("failed", event.pid, event.errno, event.stage))
        else:
            found.append(("lost", type(event.error), event.may_resend, event.reason))
    return found


def lost(stream: Stream, data: bytes) -> Lost:
    events = list(stream.receive(data))
    assert isinstance(events[-1], Lost)
    return events[-1]


# -- events --


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000, 1 << 20])
def test_conversation_in_pieces_of_any_size(size: int) -> None:
    stream = begun(ALL, input=b"abc")
    send(stream)
    data = memoryview(b"".join(CONVERSATION))
    found: list[Any] = []
    for at in range(0, len(data), size):
        found += told(stream.receive(data[at : at + size]))
    assert found == TOLD
    assert send(stream) == stdin(b"abc") + stdin()
    assert stream.is_free


def test_every_split_in_two() -> None:
    data = b"".join(CONVERSATION)
    for at in range(len(data) + 1):
        stream = begun(ALL, input=b"abc")
        assert told(stream.receive(data[:at])) + told(stream.receive(data[at:])) == TOLD


@pytest.mark.parametrize(
    "order", [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
)
def test_end_is_that_of_the_command_and_of_its_output(order: list[int]) -> None:
    ends = [OUT_END, ERR_END, exited(9)]
    stream = begun()
    send(stream)
    list(stream.receive(frames.HELLO + spawned()))
    for i in order[:2]:
        assert not list(stream.receive(ends[i]))
        assert not stream.is_free
    assert told(stream.receive(ends[order[2]])) == [("ended", -9, USAGE, None)]
    assert stream.is_free


@pytest.mark.parametrize(
    "streams, ends",
    [
        (0b000, b""),
        (0b010, OUT_END),
        (0b100, ERR_END),
        (0b010 | lib.EB_JOINED, OUT_END),
    ],
)
def test_what_is_not_streamed_is_not_awaited(streams: int, ends: bytes) -> None:
    stream = begun(streams)
    send(stream)
    found = told(stream.receive(frames.HELLO + spawned() + ends + exited()))
    assert [event[0] for event in found] == ["started", "ended"]
    assert stream.is_free


def test_brief_command() -> None:
    stream = begun(brief=True)
    send(stream)
    data = frames.HELLO + frame(lib.EB_STDOUT, b"x") + OUT_END + ERR_END + BRIEF_END
    assert told(stream.receive(data)) == [
        ("output", 0, b"x"),
        ("ended", 0, USAGE, (1234, 77, 1)),
    ]
    assert stream.pid == 0


def test_failed_start_frees_the_connection() -> None:
    stream = begun()
    send(stream)
    assert told(stream.receive(frames.HELLO + NOT_FOUND)) == [
        ("failed", 0, errno.ENOENT, lib.EB_STAGE_EXEC)
    ]
    assert stream.is_free


def test_one_command_after_another() -> None:
    stream = begun(brief=True)
    for i in range(5):
        send(stream)
        hello = b"" if i else frames.HELLO
        found = told(stream.receive(hello + OUT_END + ERR_END + BRIEF_END))
        assert [event[0] for event in found] == ["ended"]
        stream.begin(BOTH, True, REQUEST)


# -- input --


def test_input_waits_for_the_start_and_for_credit() -> None:
    data = bytes(range(256)) * 1000
    window = lib.EB_WINDOW
    stream = begun(ALL, input=data)
    assert send(stream) == REQUEST
    list(stream.receive(frames.HELLO + spawned()))
    assert send(stream) == stdin(data[:window])
    list(stream.receive(credit(1000)))
    assert send(stream) == stdin(data[window : window + 1000])
    at = window + 1000
    while at < len(data):
        list(stream.receive(credit(window)))
        part = data[at : at + window]
        at += len(part)
        assert send(stream).startswith(stdin(part))
    assert stream.unsent == b""


def test_input_of_a_brief_command_follows_its_request() -> None:
    assert send(begun(ALL, brief=True, input=b"abc")) == REQUEST + stdin(b"abc") + stdin()
    assert send(begun(ALL, brief=True, input=b"")) == REQUEST + stdin()


def test_input_that_fills_the_window_ends_with_the_next_credit() -> None:
    data = bytes(lib.EB_WINDOW)
    stream = begun(ALL, brief=True, input=data)
    assert send(stream) == REQUEST + stdin(data)
    list(stream.receive(frames.HELLO + credit(lib.EB_WINDOW)))
    assert send(stream) == stdin()


def test_unsent_input_keeps_the_connection_from_others() -> None:
    stream = begun(ALL, brief=True, input=bytes(1000))
    stream.count_sent(len(REQUEST) + 10)
    assert told(stream.receive(frames.HELLO + OUT_END + ERR_END + BRIEF_END))[0][0] == "ended"
    assert not stream.is_free


def test_half_a_frame_behind_the_end_keeps_it_too() -> None:
    for at in range(1, len(UNREAD)):
        stream = begun(brief=True)
        send(stream)
        list(stream.receive(frames.HELLO + OUT_END + ERR_END + BRIEF_END + UNREAD[:at]))
        assert not stream.is_free


# -- the end by a kill --


def test_kill_needs_no_end_of_output() -> None:
    stream = begun()
    send(stream)
    list(stream.receive(frames.HELLO + spawned()))
    assert stream.kill(-77, 77) is None
    assert send(stream) == b"".join(signal_frame(pid, 9) for pid in (-77, 77))
    data = frame(lib.EB_STDOUT, b"x") + exited(9) + frame(lib.EB_STDOUT, b"another's") + OUT_END
    assert told(stream.receive(data)) == [
        ("output", 0, b"x"),
        ("ended", -9, USAGE, None),
    ]
    assert not stream.is_free


def test_kill_of_what_has_exited_is_its_end() -> None:
    stream = begun()
    send(stream)
    list(stream.receive(frames.HELLO + spawned() + exited(0)))
    end = stream.kill(77)
    assert end is not None
    assert end.returncode == 0
    assert stream.unsent == b""


# -- losses --


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("with_input", [False, True])
def test_loss_at_every_point(reset: bool, brief: bool, with_input: bool) -> None:
    """A request is sent again if nobody has read it, and never if somebody may have read it."""
    data = [OUT_END, ERR_END, BRIEF_END] if brief else [spawned(), OUT_END, ERR_END, exited()]
    answer = frames.HELLO + b"".join(data)
    for at in range(len(answer)):
        stream = begun(ALL, brief=brief, input=b"abc" if with_input else None)
        send(stream)
        found = told(stream.receive(answer[:at]))
        send(stream)
        end = stream.end(reset)
        started = at >= len(frames.HELLO + data[0])
        greeted = at >= len(frames.HELLO)
        # A brief command's input has been sent behind the request: it may be what was not read.
        only = reset and not (brief and with_input)
        assert end.may_resend == (not greeted or (only and not started))
        assert type(end.error) is HelperDiedError
        assert "ended" not in [event[0] for event in found]


def test_loss_with_a_request_that_was_not_whole() -> None:
    for at in range(len(REQUEST)):
        stream = begun(ALL, brief=True, input=b"abc", greeted=True)
        stream.count_sent(at)
        assert stream.end().may_resend
    stream = begun(ALL, brief=True, input=b"abc", greeted=True)
    stream.count_sent(len(REQUEST))
    assert not stream.end().may_resend


def test_reset_after_a_signal_is_no_proof() -> None:
    stream = begun(greeted=True)
    send(stream)
    stream.kill(0)
    send(stream)
    assert not stream.end(reset=True).may_resend


def test_signal_before_anything_has_begun() -> None:
    stream = Stream()
    stream.signal(0, 9)
    assert send(stream) == frame(lib.EB_SIGNAL, struct.pack("<ii", 0, 9))
    assert stream.is_free
    assert not stream.end().may_resend


def test_unread() -> None:
    stream = begun(brief=True, greeted=True)
    send(stream)
    assert lost(stream, UNREAD).may_resend
    stream = begun(brief=True, greeted=True)
    list(stream.receive(OUT_END + ERR_END + BRIEF_END))
    assert isinstance(lost(stream, UNREAD).error, HelperDiedError)  # at rest
    stream = begun(greeted=True)
    assert not lost(stream, spawned() + UNREAD).may_resend  # a lie


def test_refusals() -> None:
    refused = frame(lib.EB_REFUSED, "no, für dich nicht".encode())
    found = lost(begun(), refused)
    assert (type(found.error), found.may_resend) == (RefusedError, False)
    assert found.reason == "no, für dich nicht"
    found = lost(begun(), frames.HELLO + refused)
    assert (type(found.error), found.may_resend) == (ProtocolError, False)
    assert "the helper refused: no, für dich nicht" in str(found.error)
    assert len(list(begun().receive(refused + frames.HELLO + spawned()))) == 1  # nothing after it


# -- what is not the protocol --


@pytest.mark.parametrize(
    "data",
    [
        spawned(),  # before HELLO
        OUT_END,
        exited(),
        UNREAD,
        frame(lib.EB_HELLO, struct.pack("<I", lib.EB_VERSION + 1)),
        frames.HELLO * 2,
        frames.HELLO + spawned() * 2,
        frames.HELLO + spawned(owner=lib.EB_OWNER_CALLER),
        frames.HELLO + spawned() + NOT_FOUND,
        frames.HELLO + spawned() + OUT_END * 2,
        frames.HELLO + spawned() + exited() * 2,
        frames.HELLO + spawned() + exited() + OUT_END + ERR_END + OUT_END,  # at rest
        frames.HELLO + NOT_FOUND * 2,
        frames.HELLO + credit(1),  # more than was ever sent
        frames.HELLO + frame(lib.EB_EXITED, b"short"),
        frames.HELLO + OUT_END,  # before SPAWNED
        frames.HELLO + exited(),
        frames.HELLO + spawned() + exited(0x137F),  # stopped
        frames.HELLO + spawned() + exited(0x10000),
        frames.HELLO + spawned() + BRIEF_END,
        frames.HELLO + spawned() + exited(0, b"more"),
        frames.HELLO + frame(lib.EB_STATUS_REPLY, b"{}"),
        frames.HELLO + spawned() + struct.pack("<IB", lib.EB_MAX_OUTPUT + 1, lib.EB_STDOUT),
        struct.pack("<IB", 6, lib.EB_SPAWNED),
        b"GET / HTTP/1.1",
    ],
    ids=str,
)
def test_protocol_errors(data: bytes) -> None:
    found = lost(begun(), data)
    assert (type(found.error), found.may_resend) == (ProtocolError, False)


def test_brief_command_tells_of_no_start_and_of_its_time() -> None:
    for data in frames.HELLO + spawned(), frames.HELLO + exited(), OUT_END, BRIEF_END:
        assert type(lost(begun(brief=True), data).error) is ProtocolError


def test_garbage_is_a_protocol_error_or_awaits_more() -> None:
    random = Random(11)
    pieces = [*CONVERSATION, UNREAD, NOT_FOUND, BRIEF_END, OUT_END, credit(100), REQUEST]
    for turn in range(20_000):
        stream = begun(random.choice([0, BOTH, ALL]), brief=turn % 2 == 0, input=b"abc")
        if turn % 3:
            data = bytearray(random.randbytes(random.randrange(1, 100)))
        else:
            data = bytearray(b"".join(random.choices(pieces, k=random.randrange(1, 8)))[:2000])
            for _ in range(random.randrange(3)):
                data[random.randrange(len(data))] = random.randrange(256)
        while data:
            size = random.randrange(1, len(data) + 1)
            events = list(stream.receive(bytes(data[:size])))
            data = data[size:]
            if any(isinstance(event, Lost) for event in events):
                assert isinstance(events[-1], Lost)
                break
