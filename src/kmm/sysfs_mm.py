"""/sys/kernel/mm beside the pools of huge pages (mm/ksm.c, khugepaged.c, vmscan.c, shmem.c).

Of these files only transparent_hugepage/enabled changes anything in the model; what is written to
the others is checked, kept and shown.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from kmm.errors import KernelError, kernel_error, shown
from kmm.params import PMD_SIZE, THP_MODES
from kmm.sysfs_entry import Entry, directory, kstrtobool, kstrtoull, readonly, word
from kmm.sysfs_hugetlb import kstrtoul_decimal
from kmm.watermarks import set_thp_enabled

if TYPE_CHECKING:
    from kmm.machine import Machine

MM = "/sys/kernel/mm"
INT_MAX, UINT_MAX = 2**31 - 1, 2**32 - 1
MSEC_PER_TICK = 4  # 250 ticks a second
PTES = 511  # of a table of 512, what may be empty, swapped or shared
ALL_CAPS = 7  # parts of the multi-generational LRU that can be switched on

#: What is kept of the text that a file is given.
Parse = Callable[[str, str], str]


def _number(low: int, high: int, *, overflow: int = errno.EINVAL, bits: int = 64) -> Parse:
    """A decimal number within limits; ``overflow`` is the errno for more bits than fit."""

    def parse(name: str, text: str) -> str:
        try:
            value = kstrtoul_decimal(name, text)
        except KernelError as e:
            if e.errno == errno.ERANGE and overflow != errno.ERANGE:
                raise kernel_error(-overflow, e.why) from None
            raise
        if not low <= value <= high:
            code = overflow if value >> bits else errno.EINVAL
            raise kernel_error(-code, f"{name}: {value}; allowed: {low} to {high}")
        return f"{value}\n"

    return parse


def _uint(low: int = 0) -> Parse:
    return _number(low, UINT_MAX)


def _boolean(no: str, yes: str) -> Parse:
    return lambda name, text: (yes if kstrtobool(text) else no) + "\n"


def _choice(*words: str) -> Parse:
    """One of some words, shown among the others in brackets."""

    def parse(name: str, text: str) -> str:
        if word(text) not in words:
            what = f"{name}: {shown(word(text))}; allowed: {', '.join(words)}"
            raise kernel_error(-errno.EINVAL, what)
        return " ".join(f"[{w}]" if w == word(text) else w for w in words) + "\n"

    return parse


def _any_base(name: str, text: str) -> int:
    try:
        return kstrtoull(text, 32)
    except KernelError as e:
        raise kernel_error(-errno.EINVAL, f"{name}: {e.why}") from None


def _lru_gen(name: str, text: str) -> str:
    if text[:1] in ("n", "N"):
        return f"{0:#06x}\n"
    caps = ALL_CAPS if text[:1] in ("y", "Y") else _any_base(name, text)
    return f"{caps & ALL_CAPS:#06x}\n"


def _min_ttl(name: str, text: str) -> str:
    msecs = _any_base(name, text)
    # What is negative as an int becomes the longest time that there is, cut to 32 bits.
    ticks = -(-msecs // MSEC_PER_TICK) if msecs <= INT_MAX else (2**63 - 1 >> 1) - 1
    return f"{ticks * MSEC_PER_TICK % 2**32}\n"


_flag = _number(0, 1, overflow=errno.ERANGE)
_enabled = _choice(*THP_MODES)
_DEFRAG = ("always", "defer", "defer+madvise", "madvise", "never")
_SHMEM = ("always", "within_size", "advise", "never", "deny", "force")
# Directory, file: what it shows at first and what it takes; None takes nothing.
_FILES: dict[str, dict[str, tuple[str, Parse | None]]] = {
    "ksm": {
        **dict.fromkeys(
            """full_scans pages_shared pages_sharing pages_unshared pages_volatile
            stable_node_chains stable_node_dups""".split(),
            ("0\n", None),
        ),
        "max_page_sharing": ("256\n", _number(2, INT_MAX, overflow=errno.ERANGE, bits=31)),
        "merge_across_nodes": ("1\n", _flag),
        "pages_to_scan": ("100\n", _uint()),
        "run": ("0\n", _number(0, 2)),
        "sleep_millisecs": ("20\n", _uint()),
        "stable_node_chains_prune_millisecs": ("2000\n", _uint()),
        "use_zero_pages": ("0\n", _boolean("0", "1")),
    },
    "lru_gen": {"enabled": ("0x0000\n", _lru_gen), "min_ttl_ms": ("0\n", _min_ttl)},
    "numa": {"demotion_enabled": ("false\n", _boolean("false", "true"))},
    "swap": {"vma_ra_enabled": ("true\n", _boolean("false", "true"))},
    "transparent_hugepage": {
        "defrag": (_choice(*_DEFRAG)("", "madvise"), _choice(*_DEFRAG)),
        "enabled": ("", _enabled),
        "hpage_pmd_size": (f"{PMD_SIZE}\n", None),
        "shmem_enabled": (_choice(*_SHMEM)("", "never"), _choice(*_SHMEM)),
        "use_zero_page": ("1\n", _flag),
    },
    "transparent_hugepage/khugepaged": {
        "alloc_sleep_millisecs": ("60000\n", _uint()),
        "defrag": ("1\n", _flag),
        "full_scans": ("0\n", None),
        "max_ptes_none": (f"{PTES}\n", _number(0, PTES)),
        "max_ptes_shared": ("256\n", _number(0, PTES)),
        "max_ptes_swap": ("64\n", _number(0, PTES)),
        "pages_collapsed": ("0\n", None),
        "pages_to_scan": ("4096\n", _uint(1)),
        "scan_sleep_millisecs": ("10000\n", _uint()),
    },
}


def _thp_enabled_store(m: Machine, text: str) -> None:
    _enabled("enabled", text)
    set_thp_enabled(m, word(text))


def _file(m: Machine, match: re.Match[str]) -> Entry | None:
    path, where, name = match[0], match[1], match[2]
    first, parse = _FILES[where].get(name, (None, None))
    if first is None:
        return None
    if parse is None:
        return readonly(lambda m: first)
    if parse is _enabled:
        show = f"{where}: a mode"
        return Entry(0o644, lambda m: _enabled(show, m.vm.thp_enabled), _thp_enabled_store)

    def store(m: Machine, text: str) -> None:
        m.sysfs_values[path] = parse(name, text)

    return Entry(0o644, lambda m: m.sysfs_values.get(path, first), store)


def _directory(m: Machine, match: re.Match[str]) -> Entry:
    where = match[1]
    below = (d.rpartition("/")[2] for d in _FILES if d.rpartition("/")[0] == where)
    return directory([*_FILES[where], *below])


ENTRIES = (
    (rf"{MM}/({'|'.join(_FILES)})", _directory),
    (rf"{MM}/({'|'.join(_FILES)})/(\w+)", _file),
)

DIRECTORIES: dict[str, tuple[str, ...]] = {
    MM: ("hugepages", *(name for name in _FILES if "/" not in name)),
}
