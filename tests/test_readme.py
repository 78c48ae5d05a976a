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
    scope: dict[str, object] = {}
    for block in blocks:  # each goes on where the one before has ended
        exec(block, scope)
        scope["m"].validate()  # type: ignore[attr-defined]


def test_the_first_screen_shows_what_the_demo_prints() -> None:
    """Whatever is left out, even a line, is marked by a line ``...``."""
    shown = re.search(r"^```text\n(A DIMM.*?)^```", README, re.M | re.S)
    assert shown is not None
    # Some of the kernel's lines end with a blank, which a text file should not.
    printed = CliRunner().invoke(main, ["demo"]).output.splitlines()
    rest = "".join(f"{line.rstrip()}\n" for line in printed)
    for i, part in enumerate(re.split(r"^\.\.\.\n", shown[1], flags=re.M)):
        at = rest.find(f"\n{part}") + 1 if i else 0
        assert rest.startswith(part, at), part
        rest = rest[max(at + len(part) - 1, 0) :]
    assert shown[1].endswith("...\n") or not rest.strip()


def test_the_table_of_agreement_is_what_verify_prints() -> None:
    table = re.search(r"^```text\n(buddyinfo .*?)^```", README, re.M | re.S)
    assert table is not None
    names = """anon auto_movable auto_online bad_writes four_nodes hugetlb kernel_pages kernel_zone
        memmap_on_memory migrate movable_node probe unaligned veto watermarks""".split()
    paths = [str(Path(__file__).parent / "recordings" / f"{n}.json") for n in names]
    out = CliRunner().invoke(main, ["verify", *paths])
    assert out.exit_code == 0
    assert table[1].strip() in out.output
