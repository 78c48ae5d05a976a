"""Progress of long work: what is said, how often, and that a terminal shows a bar."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kmm import Machine
from kmm.export import export_tar, export_tree
from kmm.import_machine import import_machine
from tests.conftest import two_nodes

Told = dict[str, list[tuple[int, int, str]]]


@pytest.fixture
def told() -> Told:
    return {}


@pytest.fixture
def bar(told: Told) -> Callable[[int, str], object]:
    @contextlib.contextmanager
    def listen(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
        said = told.setdefault(what, [])
        yield lambda number, words: said.append((number, total, words))

    return listen


def test_an_export_says_which_block_it_writes(
    tmp_path: Path, told: Told, bar: Callable[[int, str], object]
) -> None:
    m: Machine = two_nodes()
    n = len(m.memory_blocks)
    export_tree(m, tmp_path / "tree", bar=bar)  # type: ignore[arg-type]
    numbers = [(number, total) for number, total, _ in told.pop("block")]
    assert numbers == [(i, n) for i in range(1, n + 1)]
    export_tar(m, tmp_path / "tree.tar", bar=bar)  # type: ignore[arg-type]
    assert told["block"][0][2] == "writing sys/devices/system/memory/memory0"
    assert len(told["block"]) == n
    m.validate()


@pytest.mark.parametrize("tar", [False, True])
def test_an_import_says_what_it_reads_and_compares(
    tmp_path: Path, told: Told, bar: Callable[[int, str], object], tar: bool
) -> None:
    source = tmp_path / ("tree.tar" if tar else "tree")
    (export_tar if tar else export_tree)(two_nodes(), source)
    twin = import_machine(source, bar=bar)  # type: ignore[arg-type]
    files = twin.collected.files
    read = told["MiB" if tar else "file"]
    assert len(read) >= len(files)
    assert [number for number, _, _ in read] == sorted(number for number, _, _ in read)
    assert all(number <= total for number, total, _ in read)
    assert any(words.endswith("proc/zoneinfo") for _, _, words in read)
    assert [(number, total) for number, total, _ in told["text"]] == [
        (i, len(files)) for i in range(len(files))
    ]
    twin.machine.validate()


@pytest.mark.parametrize(("command", "what"), [("export", b"block:"), ("import", b"text:")])
def test_a_terminal_shows_a_bar_if_it_takes_long(tmp_path: Path, command: str, what: bytes) -> None:
    """What is long is set to nothing; with what it is, so short a command shows none."""
    source = tmp_path / "tree"
    if command == "import":
        export_tree(two_nodes(), source)
    for after, shown in ((0, True), (600, False)):
        code = f"""
import sys
from kmm import cli_frame
cli_frame.BAR_AFTER = {after}
from kmm.cli import main
sys.argv = ["kmm", "{command}", {str(source)!r}] + ["--force"] * ({command!r} == "export")
main()
"""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        run = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            check=False,
            timeout=120,
        )
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # what a terminal says that nobody has any more
            while more := os.read(ours, 1 << 16):
                said += more
        os.close(ours)
        assert run.returncode in (0, 1), said
        assert (what in said) == shown, said
