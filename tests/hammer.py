"""Many processes read and write a mounted machine at random, and nothing grows or breaks.

``python -m tests.hammer --seconds 3600 --processes 8``
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from kmm.mount import Mounted, mounted
from tests.fuse import MACHINE

BLOCK = 128 << 20
FIRST = 1 << 32
MEMORY = "sys/devices/system/memory"
#: What the server may grow by in the second half, KiB: what the host keeps of freed memory.
GROWTH = 48 << 10


@dataclass(slots=True)
class Said:
    """What came of it."""

    operations: int = 0
    refused: int = 0
    rss: list[int] = field(default_factory=list)  # KiB, after each quarter
    fds: list[int] = field(default_factory=list)


def _files(top: Path) -> list[Path]:
    found = []
    for path in ("proc", "sys/devices/system", "sys/kernel", "sys/module", "sys/firmware", ".kmm"):
        for where, _, names in os.walk(top / path):
            found += [Path(where) / n for n in names if not n.endswith("_pipe") and n != "validate"]
    return found


def _one(rng: random.Random, top: Path, files: list[Path]) -> None:
    """Do one thing at random; OSError if it is refused."""
    dimm, block = rng.randrange(4), 32 + rng.randrange(16)
    what = rng.random()
    if what < 0.05:
        step = f"d{dimm} {rng.randrange(2)} {FIRST + dimm * 4 * BLOCK:#x} 512M"
        _write(top / ".kmm/plug", step)
    elif what < 0.08:
        _write(top / ".kmm/unplug", f"d{dimm}")
    elif what < 0.35:
        word = rng.choice(["online", "online_kernel", "online_movable", "offline", "Online", ""])
        _write(top / MEMORY / f"memory{block}/state", word)
    elif what < 0.4:
        _write(rng.choice(files), rng.choice(["1", "0", "-1", "junk", "\0", "9" * 5000]))
    elif what < 0.45:
        os.listdir(rng.choice(files).parent)
    elif what < 0.5:
        os.stat(top / MEMORY / f"memory{block}/valid_zones")
    else:
        rng.choice(files).read_bytes()


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, f"{text}\n".encode())
    finally:
        os.close(fd)


def _worker(top: Path, seed: int, seconds: float, pipe: Connection) -> None:
    rng, operations, refused = random.Random(seed), 0, 0
    files = _files(top)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        operations += 1
        if operations % 1000 == 0:
            files = _files(top)
        try:
            _one(rng, top, files)
        except OSError as e:
            refused += 1
            assert e.errno in (1, 2, 5, 6, 11, 12, 13, 16, 17, 19, 20, 21, 22, 34, 61, 133), e
    pipe.send((operations, refused))


def _size(pid: int) -> tuple[int, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(status.split("VmRSS:")[1].split()[0])
    return rss, len(os.listdir(f"/proc/{pid}/fd"))


def _quarter(k: Mounted, seconds: float, processes: int, seed: int, said: Said) -> None:
    context = multiprocessing.get_context("fork")
    running = []
    for i in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(k.path, seed * 1000 + i, seconds, theirs))
        process.start()
        theirs.close()
        running.append((process, ours))
    for process, ours in running:
        operations, refused = ours.recv()
        process.join()
        assert process.exitcode == 0
        said.operations += operations
        said.refused += refused
    k.validate()
    rss, fds = _size(k.pid)
    said.rss.append(rss)
    said.fds.append(fds)


def hammer(seconds: float, processes: int, seed: int) -> Said:
    """Read and write at random, in four quarters; after each, all adds up.

    :raises AssertionError: if it does not, if an errno is none of the kernel's, or if the server
        has more descriptors, or much more memory, than after the first half.
    """
    said = Said()
    with mounted(MACHINE) as k:
        for quarter in range(4):
            _quarter(k, seconds / 4, processes, seed * 4 + quarter, said)
    assert said.fds[3] == said.fds[1], said
    assert said.rss[3] - said.rss[1] < GROWTH, said
    return said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(hammer(given.seconds, given.processes, given.seed))
