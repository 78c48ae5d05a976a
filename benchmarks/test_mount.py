"""A mounted machine: reads beside the same binding serving a constant, and lsmem over 16 TiB."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.conftest import GIB, TIB, big_machine
from kmm import Machine
from kmm.firmware import device_memory
from kmm.mount import MountError, check_fuse, end, mounted

try:
    check_fuse()
except MountError as e:
    pytest.skip(str(e), allow_module_level=True)

READS = 2000
STATE = "/sys/devices/system/memory/memory3/state"


def read_often(path: str) -> None:
    for _ in range(READS):
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)


def cpu_seconds(pid: int) -> float:
    """What a process has taken of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def constant(tmp_path: Path) -> Iterator[str]:
    """A file of mfusepy's that always says ``online``, with the options of a mounted machine."""
    import mfusepy

    class Constant(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
            mode = stat.S_IFDIR | 0o755 if path == "/" else stat.S_IFREG | 0o444
            return {"st_mode": mode, "st_size": 4096, "st_nlink": 1}

        def open(self, path: str, fi: Any) -> int:
            fi.direct_io = 1
            return 0

        def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:
            return b"online\n"[offset : offset + size]

        def release(self, path: str, fi: Any) -> int:
            return 0

    pid = os.fork()
    if pid == 0:
        mfusepy.FUSE(
            Constant(),
            str(tmp_path),
            foreground=True,
            raw_fi=True,
            nothreads=True,
            default_permissions=True,
            entry_timeout=10.0,
            attr_timeout=10.0,
        )
        os._exit(0)
    while not os.path.ismount(tmp_path):
        time.sleep(0.01)
    yield str(tmp_path / "state")
    end(str(tmp_path), pid)


@pytest.mark.benchmark(group="mount")
def test_reads_of_a_state_beside_a_constant(benchmark: Any, constant: str) -> None:
    """In turns, as a busy host would favour one of them."""
    seconds = []

    def setup() -> None:
        before = time.perf_counter()
        read_often(constant)
        seconds.append(time.perf_counter() - before)

    with mounted(Machine()) as k:
        path = str(k.file(STATE))
        benchmark.pedantic(read_often, (path,), setup=setup, rounds=10)
    if benchmark.stats:
        ours, other = benchmark.stats.stats.min, min(seconds)
        benchmark.extra_info["reads/s"] = round(READS / ours)
        benchmark.extra_info["of a constant"] = round(READS / other)
        benchmark.extra_info["part"] = round(other / ours, 2)


@pytest.mark.benchmark(group="mount")
@pytest.mark.skipif(shutil.which("lsmem") is None, reason="no lsmem here")
def test_lsmem_of_16_tib_cold(benchmark: Any) -> None:
    """8192 blocks of 2 GiB; each round on a new mount."""
    m = big_machine(2 * GIB, "64G")
    start = device_memory(m.config)[0]
    m.write("/sys/devices/system/memory/auto_online_blocks", "online_kernel")
    assert m.plug("first", 1, start, TIB) == 0
    m.write("/sys/devices/system/memory/auto_online_blocks", "online_movable")
    assert m.plug("rest", 1, start + TIB, 15 * TIB - 64 * GIB) == 0
    assert len(m.memory_blocks) == 8192
    seconds, server, client = [], [], []

    def run() -> None:
        with mounted(m) as k:
            before = time.perf_counter(), cpu_seconds(k.pid), os.times()
            said = subprocess.run(
                ["lsmem", "--sysroot", k.path], check=True, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - before[0])
            server.append(cpu_seconds(k.pid) - before[1])
            after = os.times()
            client.append(sum(after[2:4]) - sum(before[2][2:4]))
            assert "16T online" in said.stdout

    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info["seconds of lsmem"] = round(min(seconds), 2)
    benchmark.extra_info["CPU of the server"] = round(min(server), 2)
    benchmark.extra_info["CPU of lsmem"] = round(min(client), 2)
