"""Timers."""

from __future__ import annotations

import time

import pytest

from errand_boy._timers import Timers


def test_timers_ring_in_the_order_of_their_times() -> None:
    timers, rung = Timers(), []
    now = time.monotonic()
    for name, when in ("c", now - 1), ("a", now - 3), ("b", now - 2), ("d", now - 1):
        timers.at(when, lambda name=name: rung.append(name))  # type: ignore[misc]
    timers.after(3600, lambda: rung.append("not yet"))
    assert timers.rest() == 0
    timers.ring()
    assert rung == ["a", "b", "c", "d"]
    assert 3500 < (timers.rest() or 0) <= 3600


def test_cancelled_timers_are_not_waited_for() -> None:
    timers, rung = Timers(), []
    timer = timers.after(0, lambda: rung.append("cancelled"))
    timer.cancel()
    timer.cancel()
    assert timers.rest() is None
    timers.ring()
    assert not rung


def test_cancelled_timers_are_not_kept() -> None:
    """A program that sets and cancels a timer for each connection may have many at a time."""
    timers, rung = Timers(), []
    for _ in range(10):
        timers.after(0, lambda: rung.append("kept"))
        for _ in range(1000):
            timers.after(3600, lambda: None).cancel()
    assert len(timers._heap) < 200
    timers.ring()
    assert rung == ["kept"] * 10


def test_exception_of_an_action_leaves_the_other_timers() -> None:
    timers, rung = Timers(), []
    timers.at(0, lambda: 1 / 0)
    timers.at(1, lambda: rung.append("second"))
    with pytest.raises(ZeroDivisionError):
        timers.ring()
    timers.ring()
    assert rung == ["second"]


def test_timer_that_another_timer_sets() -> None:
    timers, rung = Timers(), []
    timers.at(0, lambda: timers.at(0, lambda: rung.append("both")))
    timers.ring()
    assert rung == ["both"]


def test_no_wait_is_longer_than_poll_can() -> None:
    timers = Timers()
    timers.after(float("inf"), lambda: None)
    assert timers.rest() == 3600
