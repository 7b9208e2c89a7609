"""Output kept in memory and in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from errand_boy._spool import Spool, coding, nameless_file, to_text


@pytest.mark.parametrize("sizes", [[0], [3], [4], [5], [2, 2], [2, 2, 1], [1] * 9, [9, 1], [4, 9]])
@pytest.mark.parametrize("with_file", [False, True])
def test_only_the_first_bytes_are_kept(sizes: list[int], with_file: bool) -> None:
    whole = bytes(range(sum(sizes)))
    spool = Spool(4, nameless_file if with_file else None)
    at = 0
    for size in sizes:
        spool.write(whole[at : at + size])
        at += size
    is_longer = len(whole) > 4
    assert bytes(spool.data) == whole[:4]
    assert spool.truncated == (is_longer and not with_file)
    assert (spool.file is not None) == (is_longer and with_file)
    assert spool.size == len(whole)
    kept = whole if with_file else whole[:4]
    for _ in range(2):
        assert [spool.read(3), spool.read(100), spool.read(1)] == [kept[:3], kept[3:], b""]
        spool.rewind()
    spool.close()


def test_everything_is_kept_without_a_bound() -> None:
    spool = Spool()
    for _ in range(100):
        spool.write(bytes(1000))
    assert (bytes(spool.data), spool.truncated) == (bytes(100_000), False)


def test_file_that_takes_a_part_at_a_time() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb", 0) as pipe, open(writing, "wb", 0) as file:
        spool = Spool(1, lambda: file)
        spool.write(b"a")
        spool.write(bytes(1000))
        assert pipe.read(10_000) == b"a" + bytes(1000)


def test_nameless_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with nameless_file() as file:
        file.write(b"x")
        assert os.pread(file.fileno(), 10, 0) == b"x"
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        nameless_file()


def test_text() -> None:
    assert to_text(b"a\r\nb\rc\n\xc3\xa9", "utf-8", "strict") == "a\nb\nc\n\u00e9"
    assert to_text(b"\xc3\xa9\xc3", "utf-8", "strict", False) == "\u00e9"
    with pytest.raises(UnicodeDecodeError):
        to_text(b"\xc3", "utf-8", "strict")
    assert coding("latin-1", None) == ("latin-1", "strict")
    assert coding(None, "replace") == coding("locale", "replace")
