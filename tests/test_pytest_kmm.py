"""The fixtures that an installed kmm gives to other test suites, run as their suites would."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kmm
from tests.fuse import needs_fuse

#: Where kmm is, built: in the sources or where it is installed.
WHERE = Path(kmm.__file__).parents[1]


def suite(
    tmp_path: Path, text: str, *options: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a test file in a directory of its own, with the plugin as the entry point loads it."""
    (tmp_path / "test_it.py").write_text(text)
    path = os.pathsep.join([str(WHERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'tmp'}",
        "-p",
        "pytest_kmm",
    ]
    return subprocess.run(
        [*command, *options, "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_machine_and_failures_to_order(tmp_path: Path) -> None:
    out = suite(
        tmp_path,
        r"""
import pytest
BLOCK = "/sys/devices/system/memory/memory3/state"

def test_plain(kmm_machine):
    assert kmm_machine.read("/sys/devices/system/node/online") == "0-1\n"

@pytest.mark.kmm(machine={"memory": "1G"})
def test_described(kmm_machine, kmm_failures):
    kmm_failures.busy(3)
    with pytest.raises(OSError, match="EBUSY"):
        kmm_machine.write(BLOCK, "offline")
    kmm_failures.forget()
    kmm_machine.write(BLOCK, "offline")

STEPS = [{"op": "write", "path": BLOCK, "value": "offline"}] * 2

@pytest.mark.kmm(scenario={"machine": {"memory": "1G"}, "steps": STEPS}, steps=1)
def test_played(kmm_machine):
    assert kmm_machine.read(BLOCK) == "offline\n"

BUSY = [{"op": "busy", "block": 3}]

@pytest.mark.kmm(scenario={"machine": {"memory": "1G"}, "steps": BUSY})
def test_ordered_by_a_step(kmm_machine, kmm_failures):
    assert kmm_failures.pending() == ["veto MEM_GOING_OFFLINE EBUSY 3"]
    kmm_failures.forget()
    kmm_machine.write(BLOCK, "offline")
""",
    )
    assert "4 passed" in out.stdout, out.stdout


def test_the_tree_is_exported_as_it_is_then(tmp_path: Path) -> None:
    out = suite(
        tmp_path,
        r"""
def test_it(kmm_machine, kmm_export):
    state = "sys/devices/system/memory/memory3/state"
    assert (kmm_export() / state).read_text() == "online\n"
    kmm_machine.write("/" + state, "offline")
    assert (kmm_export() / state).read_text() == "offline\n"
""",
    )
    assert "1 passed" in out.stdout, out.stdout


@needs_fuse
def test_programs_run_on_a_mounted_machine(tmp_path: Path) -> None:
    out = suite(
        tmp_path,
        r"""
import errno
BLOCK = "/sys/devices/system/memory/memory3/state"

def test_it(kmm_mount, kmm_run):
    kmm_mount.order("busy 3")
    out = kmm_run(["bash", "-c", f"echo offline > {BLOCK}"])
    assert out.returncode != 0 and "busy" in out.stderr.lower()
    kmm_mount.order("forget")
    assert kmm_run(["sh", "-c", f"echo offline > {BLOCK} && cat {BLOCK}"]).stdout == "offline\n"
    assert kmm_mount.read(BLOCK) == "offline\n"
    assert kmm_run(["sh", "-c", "exit 7"]).returncode == 7
""",
        "--kmm-need-mount",
    )
    assert "1 passed" in out.stdout, out.stdout


@needs_fuse
def test_a_refused_request_tells_its_reason(tmp_path: Path) -> None:
    out = suite(
        tmp_path,
        r"""
import pytest

def test_it(kmm_mount):
    with pytest.raises(OSError, match="allowed: busy BLOCK"):
        kmm_mount.order("bussy 33")
    with pytest.raises(OSError, match="'dimm9' not found") as e:
        kmm_mount.unplug("dimm9")
    assert e.value.errno == 16
    with pytest.raises(FileNotFoundError) as e:
        kmm_mount.control("plugg", "x")
    assert "dimm9" not in str(e.value)
""",
        "--kmm-need-mount",
    )
    assert "1 passed" in out.stdout, out.stdout


def test_extras_of_commands_bring_the_command_line() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    # kmm_run starts kmm shell; README installs kmm mount and kmm report by their extras.
    for name in ("mount", "report"):
        assert "kmm[cli]" in extras[name], name


def test_without_fuse_a_test_is_skipped_or_fails_if_so_wanted(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("import kmm.mount as m\nm.FUSE_DEVICE = '/dev/no-fuse'\n")
    text = "def test_it(kmm_mount): pass\n"
    assert "1 skipped" in suite(tmp_path, text).stdout
    wanted = suite(tmp_path, text, "--kmm-need-mount").stdout
    assert "1 error" in wanted or "1 failed" in wanted


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("machina={}", "['machina']; allowed: machine, scenario, steps"),
        ("machine={}, scenario={}", "machine and scenario; allowed: one of them"),
        ("machine={'cpus': -1}", "cpus: -1; allowed"),
    ],
)
def test_a_wrong_marker_is_told(tmp_path: Path, marker: str, said: str) -> None:
    text = f"import pytest\n@pytest.mark.kmm({marker})\ndef test_it(kmm_machine): pass\n"
    assert said in suite(tmp_path, text).stdout


def test_a_machine_that_does_not_add_up_fails_the_test(tmp_path: Path) -> None:
    text = "def test_it(kmm_machine): kmm_machine.totalram_pages += 1\n"
    assert "1 error" in suite(tmp_path, text).stdout


def test_nothing_of_kmm_is_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    text = "import sys\ndef test_it(): assert 'kmm' not in sys.modules\n"
    assert "1 passed" in suite(tmp_path, text).stdout
