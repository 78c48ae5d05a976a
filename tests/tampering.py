"""Which checks a module has, which of them stopped, and records that are out of Python's reach."""

from __future__ import annotations

import ast
import traceback
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from kmm.mmzone import Zone

_CHECKS = ("_equal", "_true", "_none", "_no_page", "_no_slot")


def checks_of(module: ModuleType) -> list[tuple[int, int]]:
    """First and last line of each call of a check."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    helpers = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in _CHECKS]
    inside = {id(n) for helper in helpers for n in ast.walk(helper)}
    return [
        (node.lineno, node.end_lineno or 0)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _CHECKS
        and id(node) not in inside
    ]


def line_that_raised(error: BaseException, module: ModuleType) -> int:
    """The line of a module's check that raised."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename == module.__file__ and f.name not in _CHECKS
    ]
    return frames[-1].lineno or 0 if frames else 0


def writable(view: npt.NDArray[np.uint64] | None) -> npt.NDArray[np.uint64]:
    """The array behind a read-only view of a user's table."""
    assert view is not None
    assert isinstance(view.base, np.ndarray)
    return view.base


def overwrite(zone: Zone, part: int, find: bytes, put: bytes) -> None:
    """Overwrite bytes of a zone's C struct (part 0) or of its per-CPU lists (part 1)."""
    saved = list(zone.save())
    at = saved[part].index(find)
    saved[part] = saved[part][:at] + put + saved[part][at + len(put) :]
    zone.restore(tuple(saved))
