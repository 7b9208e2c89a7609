"""The modes that a program's output has switched on in a terminal."""

from __future__ import annotations

import re

_SET = re.compile(rb"\x1b(?:\[\?([0-9;]{1,40})([hl])|([=>])|(c|\[!p))")
_LONGEST = 48  # bytes of a sequence
_ALTERNATE = {47, 1047, 1049}  # the alternate screen of full-screen programs
_USUALLY_ON = {7, 25}  # wrapped lines, visible cursor
_PASSING = {2026}  # a synchronized update, which the terminal shows only at its end
# Reset attributes, character set and scroll region; save and restore the cursor.
_PLAIN = b"\x1b[0m\x1b(B\x1b7\x1b[r\x1b8"

_CONTROLS = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x1b\x07]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
    rb"|[\0-\7\x0e-\x1a\x1c-\x1f\x7f]"
)
_HARMLESS = b"mK"  # the last bytes of sequences that change colours or clear a line
_MOST_LINES = 1 << 15  # bytes


class Modes:
    """Follows output, to bring another terminal into the same state, or back into the usual one.

    States that it does not know, such as the title or the colours, stay as they are.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._modes: dict[int, bool] = {}
        self._keypad = False

    def feed(self, data: bytes) -> None:
        """Process the next output."""
        data = self._rest + data
        end = 0
        for match in _SET.finditer(data):
            end = match.end()
            numbers, switch, keypad, reset = match.groups()
            if reset:
                self._modes.clear()
                self._keypad = False
            elif keypad:
                self._keypad = keypad == b"="
            else:
                for number in {int(text) for text in numbers.split(b";") if text} - _PASSING:
                    self._modes.pop(number, None)  # so that the latest is last
                    self._modes[number] = switch == b"h"
        cut = data.rfind(b"\x1b", max(end, len(data) - _LONGEST))
        self._rest = b"" if cut < 0 else data[cut:]

    @property
    def fills_screen(self) -> bool:
        """Whether the program uses the alternate screen, as vim and less do."""
        return any(self._modes.get(number) for number in _ALTERNATE)

    def restoring(self) -> bytes:
        """Return the sequences that bring another terminal into the state of this one."""
        switches = [b"\x1b[?%d%c" % (n, b"lh"[is_on]) for n, is_on in self._modes.items()]
        return b"".join(switches) + b"\x1b=" * self._keypad

    def undoing(self) -> bytes:
        """Return the sequences that bring this terminal back into its usual state."""
        other = [n for n, is_on in self._modes.items() if is_on != (n in _USUALLY_ON)]
        switches = [b"\x1b[?%d%c" % (n, b"lh"[n in _USUALLY_ON]) for n in reversed(other)]
        return _PLAIN + b"".join(switches) + b"\x1b>" * self._keypad


class Past:
    """The part of earlier output that a client needs who attaches late."""

    def __init__(self) -> None:
        self._modes = Modes()
        self._end = b""

    def feed(self, data: bytes) -> None:
        """Process the next output."""
        self._modes.feed(data)
        self._end = (self._end + data)[-_MOST_LINES:]

    def shown(self, rows: int) -> bytes:
        """Return the output for a screen of `rows` rows.

        It has the last lines, without sequences that move the cursor or make the terminal answer.
        """
        text = b""
        if not self._modes.fills_screen:
            text = b"\n".join(_CONTROLS.sub(_plain, self._end).split(b"\n")[-(rows or 24) :])
        return text + self._modes.restoring()


def _plain(match: re.Match[bytes]) -> bytes:
    found = match[0]
    return found if found[:2] == b"\x1b[" and found[-1] in _HARMLESS else b""
