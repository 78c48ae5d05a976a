"""What the documentation shows works, and docs/scenarios.md leaves nothing out."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import kmm
from kmm.cli import main
from kmm.config import _KEYS
from kmm.control import Control
from kmm.gfp import GFP_KERNEL
from kmm.machine_source import player_of
from kmm.memory import KINDS
from kmm.schema import GFP_WORDS, LOAD_FIELDS, SCHEMA
from kmm.tree import Tree
from tests.docs_code import DOCS, agrees, blocks, commands
from tests.fuse import needs_fuse, why_no_namespace, why_not

TEXT = (DOCS / "scenarios.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```(toml|json)\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.parametrize(("kind", "text"), FILES, ids=[kind for kind, _ in FILES])
def test_its_scenarios_run_and_nothing_in_them_is_refused(
    tmp_path: Path, kind: str, text: str
) -> None:
    path = tmp_path / f"shown.{kind}"
    path.write_text(text)
    out = CliRunner().invoke(main, ["run", str(path)])
    assert out.exit_code == 0, out.output
    assert "refused" not in out.output
    assert "_OST 0x82" not in out.output
    if "heap" in text:
        assert "1000 of 1000 blocks of order 0" in out.output
        assert re.search(r"\d+ pages 0x400", out.output)


def test_its_python_runs_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    there: dict[str, Any] = {}
    exec(compile(text, "scenarios.md", "exec"), there)
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["2048 pages came", "large is on node 1", "0 dirty pages are left"]
    assert "ENOMEM" in said[3]
    assert said[4:] == ["True"]
    assert set(there["m"].users) == {"heap", "large", "log", "database"}


def test_it_names_every_field_of_a_machine() -> None:
    table = TEXT.split("## The machine")[1].split("## The steps")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == _KEYS


def test_it_names_every_operation_and_its_fields() -> None:
    table = TEXT.split("## The steps")[1].split("## Workloads")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))
    assert set(rows) == set(SCHEMA)
    for op, fields in SCHEMA.items():
        needed, _, optional = rows[op].partition("[")
        assert re.findall(r"`(\w+)`", needed) == [f.name for f in fields if f.needed], op
        assert re.findall(r"`(\w+)`", optional) == [f.name for f in fields if not f.needed], op
    assert all(f"`{word}`" in table for word in GFP_WORDS)
    assert GFP_WORDS["GFP_KERNEL"] == GFP_KERNEL


def test_it_names_every_field_of_users_and_loads() -> None:
    text = TEXT.split("## Workloads")[1]
    users, _, loads = text.partition("| field | what it is |")
    amounts = {"pages", "size", "share"}
    named = set(re.findall(r"^\| `(\w+)` \|", users, re.M))
    assert named | amounts | {"id", "kind"} == {f.name for f in SCHEMA["user"]}
    assert all(f"`{kind}`" in users for kind in KINDS)
    rows = re.findall(r"^\| (`.*?) \|", loads, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {
        f.name for f in LOAD_FIELDS
    }


def test_each_file_of_the_control_directory_is_told() -> None:
    player = player_of({"memory": "1G"})
    table = (DOCS / "howto" / "mount-a-machine.md").read_text(encoding="utf-8")
    rows = [re.split(r"\s*\|\s*", line)[1:4] for line in table.splitlines() if line[:3] == "| `"]
    told = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    files = Control(Tree(player.m), player).files
    assert set(told) == set(files)
    for name, file in files.items():
        _, write, read = told[name]
        assert bool(write) == bool(file.mode & 0o200), name
        assert bool(read) == bool(file.mode & 0o400), name


TESTED = DOCS / "howto" / "test-a-program.md"
PAGES = [DOCS / "tutorial.md", *sorted(set((DOCS / "howto").glob("*.md")) - {TESTED})]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_prints_what_the_page_shows(page: Path) -> None:
    scope: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, page.name, "exec"), scope)
            assert agrees(block.shown or "", out.getvalue()), out.getvalue()
    if "m" in scope:
        scope["m"].validate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_print_what_the_page_shows(page: Path) -> None:
    if page.stem == "run-programs" and (why := why_not() or why_no_namespace()):
        pytest.skip(why)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in blocks(page):
        if block.language == "console":
            for command, shown in commands(block.text):
                done = subprocess.run(
                    ["bash", "-c", command],
                    capture_output=True,
                    cwd=DOCS.parent,
                    env=env,
                    text=True,
                )
                assert agrees(shown, done.stdout), f"{command}\n{done.stdout}{done.stderr}"


def test_a_page_that_shows_something_else_is_noticed() -> None:
    assert agrees("one\n...\nfour\n", "one \ntwo\nthree\nfour\n")
    assert not agrees("one\nfour\n", "one\ntwo\nfour\n")
    assert not agrees("", "one\n")


@needs_fuse
def test_the_program_of_a_page_passes_its_tests(tmp_path: Path) -> None:
    names = []
    for block in blocks(TESTED):
        name = re.match(r'"""(\w+)\.py', block.text)
        assert name is not None
        names.append(name[1])
        (tmp_path / f"{name[1]}.py").write_text(block.text)
    assert names == ["shrink", "test_shrink", "test_add"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_kmm"]
    src = os.pathsep.join([str(Path(kmm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": src, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    out = subprocess.run(
        [*command, "--kmm-need-mount"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "4 passed" in out.stdout, out.stdout
