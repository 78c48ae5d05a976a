"""Whether machines can be mounted here, and clients that are processes of their own."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from kmm import namespace
from kmm.mount import MountError, check_fuse

MACHINE: dict[str, Any] = {
    "memory": "1G",
    "maxmem": "16G",
    "cpus": 2,
    "nodes": [{"cpus": "0-1", "memory": "1G"}, {}],
    "cmdline": "memhp_default_state=offline",
}


def why_not() -> str:
    """Why machines cannot be mounted here; nothing if they can."""
    try:
        check_fuse()
    except MountError as e:
        return str(e)
    return ""


def why_no_namespace() -> str:
    """Why there are no mount namespaces for us here; nothing if there are."""
    try:
        namespace._unshare()
    except MountError as e:
        return str(e)
    return ""


needs_fuse = pytest.mark.skipif(bool(why_not()), reason=why_not() or "FUSE is there")


def sh(line: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell line."""
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False, **more
    )
