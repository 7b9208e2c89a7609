"""The program that writes docs/benchmarks.md, as fast as it can be."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs the extra bench")
if sys.platform != "linux":
    pytest.skip("measures on Linux only", allow_module_level=True)

from bench import report, syscalls
from bench.measure import DAEMON, HELPER, MAP, OURS, SUBPROCESS, Plan, measure
from bench.throughput import OUR_THREADS

pytestmark = pytest.mark.slow

PLAN = Plan(
    residents=(0.05,),
    descriptors=(100,),
    busy=False,
    ways=(SUBPROCESS, OURS, HELPER, DAEMON, MAP),
    seconds=0.01,
    rounds_least=3,
    part_seconds=0.01,
    parts_least=2,
    late_sleeps=1,
    memory_seconds=0.01,
    memory_looks=1,
    stall_seconds=0.01,
    stalls_least=5,
    commands=20,
    throughput_rounds=1,
    workers=((OUR_THREADS, (2,)), ("xargs -P", (2,)), ("errand_boy.map", (2,))),
    bulk_mib=1,
    bulk_rounds=1,
    traced=3,
)


def test_page_has_its_tables_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(report.__file__).parent.parent)
    report.write(measure(PLAN, quick=True), tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()

    sections = page.split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == [
        "Who gains",
        "One command: start to reaped",
        "The constructor",
        "Waiting with a time-out",
        "Memory while a command starts",
        "The other threads",
        "Many commands",
        "Bulk output",
        "System calls per start",
        "The size of it",
        "Options, ends, the sandbox, terminals",  # their records are kept
        "Long runs",
    ]
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.strip().splitlines()}) == 1
    assert page.count("\n\n|") >= len(sections) - 1
    for way in PLAN.ways:
        assert f"| {way.name} | " in sections[1]
    assert syscalls.UNEXPLAINED not in page
    for plot in re.findall(r"\]\((\S+\.svg)\)", page):
        assert ElementTree.parse(tmp_path / plot).getroot().tag.endswith("}svg")
