"""The tunables of /proc/sys/vm that hot-plug depends on (kernel/sysctl.c, mm/page_alloc.c)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.compaction import compact_nodes, compaction_proactiveness_changed
from kmm.errors import ConfigError, kernel_error, shown
from kmm.filemap import drop_pagecache
from kmm.procfs import parse_long
from kmm.shrinker import drop_slab
from kmm.watermarks import (
    set_boost_factor,
    setup_per_zone_lowmem_reserve,
    setup_per_zone_wmarks,
    writeback_set_ratelimit,
    zone_set_pageset_high_and_batch,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

INT_MAX = 2**31 - 1
MIN_HIGH_FRACTION = 8


@dataclass(frozen=True, slots=True)
class Tunable:
    """One integer file: the attribute of VmSysctl, limits, and what a write sets off."""

    name: str
    low: int
    high: int
    after: Callable[[Machine, int], None]

    def takes(self, value: int) -> bool:
        """Whether the kernel takes a value."""
        if self.name == "percpu_pagelist_high_fraction" and 0 < value < MIN_HIGH_FRACTION:
            return False
        return self.low <= value <= self.high

    def store(self, m: Machine, value: int) -> None:
        """Keep a value; nothing is recomputed."""
        if self.name in KEPT:
            m.vm.kept[self.name] = value
            return
        setattr(m.vm, self.name, value)
        if self.name == "watermark_boost_factor":
            set_boost_factor(m, value)


def _min_free(m: Machine, value: int) -> None:
    m.vm.user_min_free_kbytes = value
    setup_per_zone_wmarks(m)


def _scale(m: Machine, value: int) -> None:
    setup_per_zone_wmarks(m)


def _fraction(m: Machine, value: int) -> None:
    for zone in m.all_zones():
        if zone.populated:
            zone_set_pageset_high_and_batch(m, zone)


def _nothing(m: Machine, value: int) -> None:
    pass


def _dirty(m: Machine, value: int) -> None:
    writeback_set_ratelimit(m)


def _proactiveness(m: Machine, value: int) -> None:
    if value:
        compaction_proactiveness_changed(m)


#: Of those that are only kept: what a write sets off.
_AFTER = {"compaction_proactiveness": _proactiveness}

#: Tunables whose value is kept and shown, and asked for by name where it counts: limits, default.
KEPT: dict[str, tuple[int, int, int]] = {
    "compact_unevictable_allowed": (0, 1, 1),
    "compaction_proactiveness": (0, 100, 20),
    "extfrag_threshold": (0, 1000, 500),
    "min_slab_ratio": (0, 100, 5),
    "min_unmapped_ratio": (0, 100, 1),
    "overcommit_memory": (0, 2, 0),
    "overcommit_ratio": (0, INT_MAX, 50),
    "panic_on_oom": (0, 2, 0),
    "stat_interval": (0, INT_MAX, 1),
    "swappiness": (0, 200, 60),
    "vfs_cache_pressure": (0, INT_MAX, 100),
    "zone_reclaim_mode": (0, INT_MAX, 0),
}

TUNABLES = {
    t.name: t
    for t in (
        Tunable("min_free_kbytes", 0, INT_MAX, _min_free),
        Tunable("watermark_scale_factor", 1, 3000, _scale),
        Tunable("watermark_boost_factor", 0, INT_MAX, _nothing),
        Tunable("percpu_pagelist_high_fraction", 0, INT_MAX, _fraction),
        Tunable("dirty_ratio", 0, 100, _dirty),
        Tunable("dirty_background_ratio", 0, 100, _nothing),
        Tunable("user_reserve_kbytes", 0, INT_MAX, _nothing),
        Tunable("admin_reserve_kbytes", 0, INT_MAX, _nothing),
        *(
            Tunable(name, low, high, _AFTER.get(name, _nothing))
            for name, (low, high, _) in KEPT.items()
        ),
    )
}


def read_tunable(m: Machine, name: str) -> str:
    """Return the text of a tunable's file; reading the reserve ratios recomputes the reserves.

    :raises NoSuchFile: for another name.
    """
    if name == "lowmem_reserve_ratio":
        setup_per_zone_lowmem_reserve(m)
        return "\t".join(str(m.vm.lowmem_reserve_ratio[i]) for i in m.config.zones) + "\n"
    if name not in TUNABLES:
        raise kernel_error(-2, f"/proc/sys/vm/{name}")
    if name in KEPT:
        return f"{m.vm.kept.get(name, KEPT[name][2])}\n"
    return f"{getattr(m.vm, name)}\n"


#: Files that a write makes something happen in and that keep no value, with their modes.
ACTIONS = {"compact_memory": 0o200, "drop_caches": 0o200, "stat_refresh": 0o600}


def _act(m: Machine, name: str, text: str) -> None:
    if name == "drop_caches":
        number = parse_long(text)
        if number is None or not 1 <= number[0] <= 4:
            raise kernel_error(-22, f"drop_caches: {text.strip()!r}; allowed: 1 to 4")
        if number[0] & 1:
            drop_pagecache(m)
        if number[0] & 2:
            drop_slab(m)
            m.count_vm_event("drop_slab")
    elif name == "compact_memory":
        compact_nodes(m)
    # No counter lags behind: stat_refresh has nothing to do.


def write_tunable(m: Machine, name: str, text: str) -> None:
    """Write a tunable's file.

    :raises InvalidArgument: not a number, or outside what the kernel takes; nothing changes.
    :raises NoSuchFile: for another name.
    """
    if name == "lowmem_reserve_ratio":
        _write_ratios(m, text)
        return
    if name in ACTIONS:
        _act(m, name, text)
        return
    tunable = TUNABLES.get(name)
    if tunable is None:
        raise kernel_error(-2, f"/proc/sys/vm/{name}")
    number = parse_long(text)
    value = number[0] if number else None
    if value is None or not tunable.takes(value):
        allowed = f"{tunable.low} to {tunable.high}"
        raise kernel_error(-22, f"{name}: {shown(text.strip())}; allowed: {allowed}")
    tunable.store(m, value)
    tunable.after(m, value)


def load_tunables(m: Machine, files: Mapping[str, str], base: str) -> None:
    """Give the tunables the values that a real machine's files show, and set nothing off.

    :param files: path to text; a file that is absent or empty leaves the default.
    :param base: the directory of the files, with the slash.
    :raises ConfigError: naming a file with a value that the kernel does not take.
    """
    for name, tunable in TUNABLES.items():
        text = files.get(base + name, "").strip()
        if not text:
            continue
        number = parse_long(text)
        if number is None or number[1].strip() or not tunable.takes(number[0]):
            raise ConfigError(
                f"{base}{name}: {shown(text)}; allowed: {tunable.low} to {tunable.high}"
            )
        tunable.store(m, number[0])
    path = base + "lowmem_reserve_ratio"
    words = files.get(path, "").split()
    for idx, word in zip(m.config.zones, words, strict=False):
        number = parse_long(word)
        if number is None or not 0 <= number[0] <= INT_MAX:
            raise ConfigError(f"{path}: {shown(word)}; allowed: numbers from 0 to {INT_MAX}")
        m.vm.lowmem_reserve_ratio[idx] = number[0]


def _write_ratios(m: Machine, text: str) -> None:
    # The kernel's handler answers success whatever it could parse; what it could, it keeps.
    rest = text
    for idx in m.config.zones:
        number = parse_long(rest)
        if number is None or not -(2**31) <= number[0] <= INT_MAX:
            break
        m.vm.lowmem_reserve_ratio[idx] = number[0]
        rest = number[1]
    for i, ratio in enumerate(m.vm.lowmem_reserve_ratio):
        if ratio < 1:
            m.vm.lowmem_reserve_ratio[i] = 0
    setup_per_zone_lowmem_reserve(m)
