"""The app of test_celery's workers and of its clients."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.backends.filesystem import FilesystemBackend
from celery.signals import worker_init
from kombu.transport import filesystem, virtual

INTERVAL = 0.1  # seconds between a worker's checks for messages and for its own end


class Results(FilesystemBackend):  # type: ignore[misc]
    """Celery's own, except that nobody reads an incomplete result."""

    def set(self, key: bytes, value: bytes) -> None:
        path = self._filename(key)
        new = path + b".%d.%d" % (os.getpid(), id(value))
        with open(new, "wb") as file:
            file.write(value if isinstance(value, bytes) else value.encode())
        os.replace(new, path)


_Base: Any = filesystem.Channel


class Channel(_Base):  # type: ignore[misc]
    """Kombu's own, except that nobody reads an incomplete message and loses it."""

    def _put(self, queue: Any, payload: Any, **kwargs: Any) -> None:
        name = f"{time.monotonic_ns():020}_{uuid4()}.{queue}.msg"
        new = Path(self.data_folder_out, f"{name}.new")
        new.write_text(json.dumps(payload))
        new.rename(Path(self.data_folder_out, name))


filesystem.Transport.Channel = Channel


@worker_init.connect  # type: ignore[untyped-decorator]
def _wait_shortly(**_: object) -> None:
    """Make a worker in one process wait for less than Celery's two seconds at a time."""
    transport: Any = virtual.Transport
    drain_events = transport.drain_events

    def drain_shortly(self: Any, connection: Any, timeout: float | None = None) -> Any:
        return drain_events(self, connection, timeout and min(timeout, INTERVAL))

    transport.drain_events = drain_shortly


def make_app(broker: str) -> Any:
    """Return an app whose broker is Redis at an address, or a directory."""
    app = Celery("celery_app", include=["errand_boy.celery"], set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        task_acks_late="CELERY_TEST_EARLY" not in os.environ,
        task_reject_on_worker_lost=True,
        worker_hijack_root_logger=False,
        worker_lost_wait=1.0,
    )
    if broker.startswith("redis"):
        app.conf.update(
            broker_url=broker,
            result_backend=broker,
            # Seconds until the tasks of a worker that disappeared go to another one.
            broker_transport_options={
                "visibility_timeout": 3,
                "max_connections": 100,
                "polling_interval": INTERVAL,
            },
            result_backend_transport_options={"retry_policy": {"max_retries": 2}},
        )
    else:
        folders = {name: Path(broker, name) for name in ("messages", "control", "results")}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        app.conf.update(
            broker_url="filesystem://",
            result_backend=f"celery_app:Results+file://{folders['results']}",
            broker_transport_options={
                "data_folder_in": str(folders["messages"]),
                "data_folder_out": str(folders["messages"]),
                "processed_folder": broker,
                "store_processed": True,  # the other way is through the folder of all
                "control_folder": str(folders["control"]),
                "polling_interval": 0.05,
            },
        )
    app.task(_total, name="celery_app.total")
    return app


def _total(outcomes: list[dict[str, Any]]) -> int:
    return sum(int(outcome["stdout"]) for outcome in outcomes)


if "CELERY_TEST_BROKER" in os.environ:
    app = make_app(os.environ["CELERY_TEST_BROKER"])
