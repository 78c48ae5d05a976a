"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from kmm.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert blocks
    for block in blocks:
        scope: dict[str, object] = {}
        exec(block, scope)
        scope["m"].validate()  # type: ignore[attr-defined]


def test_the_first_screen_shows_what_the_demo_prints() -> None:
    shown = re.search(r"^```text\n(A DIMM.*?)^```", README, re.M | re.S)
    assert shown is not None
    printed = CliRunner().invoke(main, ["demo"]).output.splitlines()
    for line in shown[1].splitlines():
        assert line == "..." or line in printed, line


def test_the_table_of_agreement_is_what_verify_prints() -> None:
    table = re.search(r"^```text\n(buddyinfo .*?)^```", README, re.M | re.S)
    assert table is not None
    names = """auto_movable auto_online bad_writes four_nodes kernel_zone memmap_on_memory
        movable_node probe unaligned veto watermarks""".split()
    paths = [str(Path(__file__).parent / "recordings" / f"{n}.json") for n in names]
    out = CliRunner().invoke(main, ["verify", *paths])
    assert out.exit_code == 0
    assert table[1].strip() in out.output
