"""Running programs that were written for a real machine on a machine's files."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from kmm.mount import FUSE_DEVICE
from tests.fuse import why_not

#: Set where every program has to be there, so that no test is skipped without a word.
REQUIRED = "KMM_PROGRAMS"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a foreign program might reach of the host's, and must not.
SHADOWED = ("modprobe", "dmesg", "insmod", "rmmod")
_BOUND = (
    "/proc/buddyinfo",
    "/proc/meminfo",
    "/proc/vmstat",
    "/proc/zoneinfo",
    "/sys/devices/system/memory",
    "/sys/devices/system/node",
)


def program(name: str) -> str:
    """Return the path of a program; without it, the test is skipped, or fails where it must not."""
    found = shutil.which(name, path=PATH)
    if found is None:
        missing(f"{name} is not installed")
    return str(found)


def missing(what: str) -> None:
    """Skip the test, or fail it where everything has to be there."""
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what}, and {REQUIRED} is set")
    pytest.skip(what)


def need_fuse() -> None:
    """Skip the test where the host has no FUSE; fail it where only a library is missing."""
    if not os.path.exists(FUSE_DEVICE):
        pytest.skip(f"{FUSE_DEVICE} is not there")
    if reason := why_not():
        missing(reason)


def environment(**more: str) -> dict[str, str]:
    """The environment of a program: plain texts, and nothing of the caller's."""
    return {"PATH": PATH, "LC_ALL": "C", "TERM": "dumb", "HOME": "/nonexistent", **more}


def run(
    command: Sequence[str], status: int | None = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a program and check its exit status; ``more`` are variables of its environment."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**more), timeout=60
    )
    assert status is None or done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done


def over(tree: Path, command: Sequence[str], *, whole: bool = False) -> str:
    """Run a program where an export's files lie over the host's; return its output.

    :param tree: the export; whole: whether its ``/sys`` lies over all of the host's.
    """
    lines = ["set -e"]
    for name in SHADOWED:
        if found := shutil.which(name, path=PATH):
            lines.append(f"mount --bind /bin/false {os.path.realpath(found)}")
    paths = ["/sys", *(p for p in _BOUND if p.startswith("/proc/"))] if whole else _BOUND
    lines += [f"mount --bind {tree}{path} {path}" for path in paths]
    lines.append('exec "$@"')
    unshare = [program("unshare"), "--mount", "--propagation", "private"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        missing("this host lets us have no mount namespace")
    script = ["/bin/sh", "-c", "\n".join(lines), "sh", *command]
    return run([*unshare, "--", *script]).stdout
