"""Makes other Popen classes start commands through errand-boy, by replacing their methods."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from errand_boy._process import child, popen, start

_originals: dict[tuple[Any, str], Any] = {}  # a class's own member, or None if inherited
_lock = threading.RLock()  # of that, and of those members


def patch() -> None:
    """See errand_boy.patch."""
    _patch_stdlib()
    for name, patch_module in _MODULES.items():
        module = sys.modules.get(name)
        if module is not None:
            patch_module(module)
    with _lock:
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)


def unpatch() -> None:
    """See errand_boy.unpatch."""
    with _lock:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(_finder)
        while _originals:
            (owner, name), original = _originals.popitem()
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a member of a class or a module by `replacement(original)`."""
    with _lock:
        if (owner, name) not in _originals:
            original = getattr(owner, name)
            _originals[owner, name] = vars(owner).get(name)
            setattr(owner, name, wraps(original)(replacement(original)))


def _patch_stdlib() -> None:
    # eventlet loads copies of the module, and replaces the original class by a subclass of a copy's
    # class. Other modules may have imported any of them.
    for owner in {popen._Base, subprocess.Popen, *object.__subclasses__()}:
        if (owner.__module__, owner.__name__) == ("subprocess", "Popen"):
            _patch_class(owner, _execute_child)


def _execute_child(original: Callable[..., None], process: Any, *args: Any) -> None:
    if isinstance(process, popen.Popen):  # our own class, which forks for a preexec_fn
        original(process, *args)
    else:
        start.execute(process, args, original)


def _patch_class(owner: type, execute_child: Callable[..., None]) -> None:
    _replace(owner, "_execute_child", _with_original(execute_child))
    _replace(owner, "_internal_poll", _with_original(child.internal_poll))
    _replace(owner, "_wait", _with_original(child.wait))
    _replace(owner, "send_signal", _with_original(child.send_signal))


def _with_original(function: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(original: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return method

    return replacement


# -- modules that may be loaded before or after --


def _late(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return a function that calls the function `name` of our module, looked up at each call.

    The module may still be loading, if its own import of the framework has led here.
    """

    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(module, name)(*args, **kwargs)

    return function


def _patch_eventlet(module: ModuleType) -> None:
    from errand_boy import eventlet  # noqa: PLC0415

    _patch_class(module.Popen, _late(eventlet, "execute_child"))
    _replace(module.Popen, "wait", _with_original(_late(eventlet, "wait")))
    _patch_stdlib()


def _patch_gevent(module: ModuleType) -> None:
    from errand_boy import gevent  # noqa: PLC0415

    _replace(module.Popen, "_execute_child", _with_original(_late(gevent, "execute_child")))
    _replace(module.Popen, "_internal_poll", _with_original(_late(gevent, "internal_poll")))
    _replace(module.Popen, "send_signal", _with_original(_late(gevent, "send_signal")))
    _replace(module.Popen, "wait", _with_original(_late(gevent, "wait")))


async def _make_subprocess_transport(loop: Any, *args: Any, **kwargs: Any) -> Any:
    from errand_boy._asyncio.transport import make_transport  # noqa: PLC0415

    return await make_transport(loop, *args, **kwargs)


def _patch_asyncio(module: ModuleType) -> None:
    _replace(
        module._UnixSelectorEventLoop,
        "_make_subprocess_transport",
        lambda original: _make_subprocess_transport,
    )


def _patch_uvloop(module: ModuleType) -> None:
    def subprocess_exec(original: Any) -> Any:
        async def subprocess_exec(
            self: Any, protocol_factory: Callable[[], Any], program: Any, *args: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            return await _start_on_uvloop(self, protocol_factory, (program, *args), False, kwargs)

        return subprocess_exec

    def subprocess_shell(original: Any) -> Any:
        async def subprocess_shell(
            self: Any, protocol_factory: Callable[[], Any], cmd: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            return await _start_on_uvloop(self, protocol_factory, cmd, True, kwargs)

        return subprocess_shell

    _replace(module.Loop, "subprocess_exec", subprocess_exec)
    _replace(module.Loop, "subprocess_shell", subprocess_shell)


async def _start_on_uvloop(
    loop: Any, protocol_factory: Callable[[], Any], args: Any, shell: bool, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    if kwargs.pop("shell", shell) is not shell:
        raise ValueError(f"shell must be {shell}")
    for name in ("universal_newlines", "text", "encoding", "errors", "bufsize"):
        if kwargs.pop(name, None):
            raise ValueError(f"{name} must not be given: the streams carry bytes")
    standard = [kwargs.pop(name, subprocess.PIPE) for name in ("stdin", "stdout", "stderr")]
    protocol = protocol_factory()
    transport = await _make_subprocess_transport(
        loop, protocol, args, shell, *standard, bufsize=0, **kwargs
    )
    return transport, protocol


def _patch_ptyprocess(module: ModuleType) -> None:
    owner = module.PtyProcess
    with _lock:
        if (owner, "spawn") in _originals:
            return
        original = _originals[owner, "spawn"] = vars(owner)["spawn"]

        @wraps(original.__func__)
        def spawn(cls: Any, *args: Any, **kwargs: Any) -> Any:
            from errand_boy import ptyprocess  # noqa: PLC0415

            return ptyprocess.spawn(original.__get__(None, cls), cls, *args, **kwargs)

        owner.spawn = classmethod(spawn)


def _patch_pty(module: ModuleType) -> None:
    def spawn(original: Any) -> Any:
        def spawn(argv: Any, *args: Any, **kwargs: Any) -> Any:
            from errand_boy import _forkpty  # noqa: PLC0415

            return _forkpty.spawn(original, argv, *args, **kwargs)

        return spawn

    _replace(module, "spawn", spawn)


_MODULES: dict[str, Callable[[ModuleType], None]] = {
    "asyncio.unix_events": _patch_asyncio,
    "eventlet.green.subprocess": _patch_eventlet,
    "gevent.subprocess": _patch_gevent,
    "pty": _patch_pty,
    "ptyprocess.ptyprocess": _patch_ptyprocess,
    "uvloop": _patch_uvloop,
}


class _Finder:
    """Patches a module as soon as it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch_module = _MODULES.get(name)
        if patch_module is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _execute_with(spec.loader, patch_module)
                return spec
        return None


def _execute_with(loader: Any, patch_module: Callable[[ModuleType], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if _finder in sys.meta_path:
            patch_module(module)

    loader.exec_module = exec_module  # affects only this module: finders make a loader for each


_finder: Any = _Finder()
