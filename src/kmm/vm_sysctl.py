"""The tunables of /proc/sys/vm that hot-plug depends on (kernel/sysctl.c, mm/page_alloc.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kmm.compaction import compact_nodes, compaction_proactiveness_changed
from kmm.errors import ConfigError, kernel_error, shown
from kmm.filemap import drop_pagecache
from kmm.params import PAGE_SIZE
from kmm.procfs import parse_long
from kmm.shrinker import drop_slab
from kmm.vmstat import count_numa_events
from kmm.watermarks import (
    set_boost_factor,
    setup_per_zone_lowmem_reserve,
    setup_per_zone_wmarks,
    writeback_set_ratelimit,
    zone_set_pageset_high_and_batch,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
UINT_MAX, ULONG_MAX = 2**32 - 1, 2**64 - 1
HZ = 250  # the reference build's; what is kept in ticks takes no more seconds than fit
MIN_HIGH_FRACTION = 8
LOG_LINE_MAX = 992  # bytes of a record of the kernel log


@dataclass(frozen=True, slots=True)
class Tunable:
    """One integer file: the attribute of VmSysctl, limits, and what a write sets off."""

    name: str
    low: int
    high: int
    after: Callable[[Machine, int], None]

    def takes(self, value: int) -> bool:
        """Whether the kernel takes a value."""
        if self.name in _FLAGS:
            return abs(value) <= ULONG_MAX
        if self.name == "percpu_pagelist_high_fraction" and 0 < value < MIN_HIGH_FRACTION:
            return False
        return self.low <= value <= self.high

    def store(self, m: Machine, value: int) -> None:
        """Keep a value; nothing is recomputed."""
        if self.name in _FLAGS:
            value = int(value != 0)
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
    if value:  # while bytes count the ratio is 0, and writing that again changes nothing
        m.vm.dirty_bytes = 0
    writeback_set_ratelimit(m)


def _dirty_background(m: Machine, value: int) -> None:
    m.vm.dirty_background_bytes = 0


def _dirty_bytes(m: Machine, value: int) -> None:
    m.vm.dirty_ratio = 0
    writeback_set_ratelimit(m)


def _dirty_background_bytes(m: Machine, value: int) -> None:
    m.vm.dirty_background_ratio = 0


def _overcommit_ratio(m: Machine, value: int) -> None:
    m.vm.overcommit_kbytes = 0


def _overcommit_kbytes(m: Machine, value: int) -> None:
    m.vm.overcommit_ratio = 0


def _numa_stat(m: Machine, value: int) -> None:
    for zone in m.all_zones():
        count_numa_events(zone, bool(value))


def _proactiveness(m: Machine, value: int) -> None:
    if value:
        compaction_proactiveness_changed(m)


#: Of those that are only kept: what a write sets off.
_AFTER = {"compaction_proactiveness": _proactiveness, "numa_stat": _numa_stat}
# What becomes 0 or 1, whatever number it is.
_FLAGS = frozenset(("hugetlb_optimize_vmemmap",))
# Bytes: at least so many, and no more pages than fit in 32 bits.  They show 0 where a ratio counts.
_BYTES = ("dirty_background_bytes", "dirty_bytes")
#: Files that only root may read.
SECRET = frozenset(("mmap_rnd_bits", "mmap_rnd_compat_bits"))
#: Files that hold no single number.
OTHERS = ("lowmem_reserve_ratio", "numa_zonelist_order")

#: Tunables whose value is kept and shown, and asked for by name where it counts: limits, default.
KEPT: dict[str, tuple[int, int, int]] = {
    "compact_unevictable_allowed": (0, 1, 1),
    "compaction_proactiveness": (0, 100, 20),
    "dirty_expire_centisecs": (0, INT_MAX, 3000),
    "dirty_writeback_centisecs": (INT_MIN, INT_MAX, 500),
    "dirtytime_expire_seconds": (0, INT_MAX, 43200),
    "extfrag_threshold": (0, 1000, 500),
    "hugetlb_optimize_vmemmap": (0, 1, 0),
    "laptop_mode": (-(INT_MAX // HZ), INT_MAX // HZ, 0),
    "legacy_va_layout": (0, INT_MAX, 0),
    "max_map_count": (0, INT_MAX, 65530),
    "memory_failure_early_kill": (0, 1, 0),
    "memory_failure_recovery": (0, 1, 1),
    "min_slab_ratio": (0, 100, 5),
    "min_unmapped_ratio": (0, 100, 1),
    "mmap_min_addr": (0, ULONG_MAX, 65536),
    "mmap_rnd_bits": (28, 32, 28),
    "mmap_rnd_compat_bits": (8, 16, 8),
    "numa_stat": (0, 1, 1),
    "oom_dump_tasks": (INT_MIN, INT_MAX, 1),
    "oom_kill_allocating_task": (INT_MIN, INT_MAX, 0),
    "overcommit_memory": (0, 2, 0),
    "page-cluster": (0, INT_MAX, 3),
    "page_lock_unfairness": (0, INT_MAX, 5),
    "panic_on_oom": (0, 2, 0),
    "stat_interval": (-(INT_MAX // HZ), INT_MAX // HZ, 1),
    "swappiness": (0, 200, 60),
    "unprivileged_userfaultfd": (0, 1, 0),
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
        Tunable("dirty_background_ratio", 0, 100, _dirty_background),
        Tunable("dirty_bytes", 2 * PAGE_SIZE, UINT_MAX * PAGE_SIZE, _dirty_bytes),
        Tunable("dirty_background_bytes", 1, UINT_MAX * PAGE_SIZE, _dirty_background_bytes),
        Tunable("overcommit_ratio", INT_MIN, INT_MAX, _overcommit_ratio),
        Tunable("overcommit_kbytes", 0, ULONG_MAX, _overcommit_kbytes),
        Tunable("user_reserve_kbytes", 0, ULONG_MAX, _nothing),
        Tunable("admin_reserve_kbytes", 0, ULONG_MAX, _nothing),
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
    if name == "numa_zonelist_order":
        return "Node\n"
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
    if name == "numa_zonelist_order":
        _write_zonelist_order(m, text)
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
        too_many = value is not None and name in _BYTES and tunable.high < value <= ULONG_MAX
        allowed = f"{tunable.low} to {tunable.high}"
        code = -errno.ERANGE if too_many else -errno.EINVAL
        raise kernel_error(code, f"{name}: {shown(text.strip())}; allowed: {allowed}")
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
        unset = number is not None and number[0] == 0 and name in _BYTES
        if number is None or number[1].strip() or not (unset or tunable.takes(number[0])):
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


def _write_zonelist_order(m: Machine, text: str) -> None:
    # The order by zones is gone; the words that once asked for the other one are still taken.
    if text[:1] not in ("d", "D", "n", "N"):
        line = f"Ignoring unsupported numa_zonelist_order value:  {text}"[:LOG_LINE_MAX]
        for part in line.split("\n"):
            m.printk(part)
        what = (
            f"numa_zonelist_order: {shown(text.strip())}; allowed: a word that begins with d or n"
        )
        raise kernel_error(-errno.EINVAL, what)


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
