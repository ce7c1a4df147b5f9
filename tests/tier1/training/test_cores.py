from __future__ import annotations

import os

import pytest

from tier1.training import data
from tier1.training.cores import processes_that_fit

MIB = 1 << 20
POD = {"cpu.max": "200000 100000\n", "memory.max": f"{4096 * MIB}\n"}


@pytest.fixture
def fitting(tmp_path, monkeypatch):
    """Return a function that says how many processes of 300 MiB fit on a node of 64 cores, by files of the group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))

    def ask(files: dict[str, str]) -> int:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return processes_that_fit(300 * MIB, tmp_path)

    return ask


@pytest.mark.parametrize(
    ("files", "processes"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, 64),
        (POD, 2),
        (POD | {"cpu.max": "150000 100000\n"}, 2),
        (POD | {"cpu.max": "max 100000\n"}, 12),
        (POD | {"memory.max": f"{400 * MIB}\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 64),
        ({"memory/memory.limit_in_bytes": f"{2048 * MIB}\n"}, 5),
    ],
    ids=str,
)
def test_a_pod_on_a_large_node_starts_what_its_limits_hold(fitting, files, processes):
    """Guards against a process per core of the node, of which a pod of two CPUs is killed each time."""
    assert fitting(files) == processes


def test_packing_asks_what_fits(tmp_path, monkeypatch, write_jsonl, tokenizer, texts):
    """Guards the seam: as many processes are started as fit, and none for little text."""
    asked = []
    monkeypatch.setattr(data, "processes_that_fit", lambda bytes_each: asked.append(bytes_each) or 1)
    path = write_jsonl("a.jsonl", [{"text": text} for text in texts])
    data.prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=tmp_path / "little")
    assert not asked
    monkeypatch.setattr(data, "WORTH_PROCESSES_BYTES", 1)
    data.prepare_dataset({"a": path}, tokenizer, seq_len=16, out_dir=tmp_path / "much")
    assert asked == [data.PROCESS_BYTES]
