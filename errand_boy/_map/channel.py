"""A connection of a `map`, and the command that runs over it."""

from __future__ import annotations

import socket
import struct

from errand_boy._wire.connection import SEND_FLAGS, Connection
from errand_boy._wire.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from errand_boy._map.command import Job


class Channel:
    """A connection, and the job that it carries, or None."""

    __slots__ = ("awaits_room", "connection", "fd", "generation", "job", "sock", "stream")

    def __init__(self, connection: Connection, generation: int) -> None:
        self.connection = connection
        self.generation = generation
        self.sock = connection.sock
        self.fd = connection.sock.fileno()
        self.stream = Stream(connection.greeted)
        self.awaits_room = False  # in the socket
        self.job: Job | None = None

    def send(self, fds: Sequence[int] = ()) -> bool:
        """Send as much as the socket takes; return whether `awaits_room` has changed.

        All of `fds` are sent. With `fds`, no earlier data may still be unsent.
        """
        stream = self.stream
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
                stream.count_sent(self.sock.sendmsg([stream.unsent], rights, SEND_FLAGS))
            else:
                stream.count_sent(self.sock.send(stream.unsent, SEND_FLAGS))
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            stream.unsent = b""  # reading will show why
        awaits_room = bool(stream.unsent)
        changed = awaits_room != self.awaits_room
        self.awaits_room = awaits_room
        return changed
