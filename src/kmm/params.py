"""Every number of the modelled machine, and the description a machine is built from."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmm.errors import ConfigError, shown

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
SECTION_SIZE_BITS = 27
SECTION_SIZE = 1 << SECTION_SIZE_BITS
PFN_SECTION_SHIFT = SECTION_SIZE_BITS - PAGE_SHIFT
PAGES_PER_SECTION = 1 << PFN_SECTION_SHIFT
PAGES_PER_SUBSECTION = 512
MAX_PHYSMEM_BITS = 46
PHYSMEM_END = (1 << MAX_PHYSMEM_BITS) - 1
NR_PAGES_MAX = 1 << (MAX_PHYSMEM_BITS - PAGE_SHIFT)
PAGEBLOCK_ORDER = 9
PAGEBLOCK_NR_PAGES = 1 << PAGEBLOCK_ORDER
MAX_ORDER = 11
PMD_SIZE = 2 * MiB
# Free pageblocks of a zone whose page records may stay resident on the host (8 KiB each).
FREE_RECORDS_KEPT = 8192

ZONE_NAMES = ("DMA", "DMA32", "Normal", "Movable", "Device")
ZONE_DMA, ZONE_DMA32, ZONE_NORMAL, ZONE_MOVABLE, ZONE_DEVICE = range(5)
MAX_NR_ZONES = 5
MAX_DMA_PFN = (16 * MiB) >> PAGE_SHIFT
MAX_DMA32_PFN = (4 * GiB) >> PAGE_SHIFT

MIGRATETYPE_NAMES = ("Unmovable", "Movable", "Reclaimable", "HighAtomic", "Isolate")
MIGRATE_UNMOVABLE, MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE = range(3)
MIGRATE_HIGHATOMIC, MIGRATE_ISOLATE = 3, 4
MIGRATE_TYPES = 5

LOCAL_DISTANCE, REMOTE_DISTANCE = 10, 20
DEFAULT_LOWMEM_RESERVE_RATIO = (256, 256, 32, 0, 0)
ONLINE_TYPES = ("offline", "online", "online_kernel", "online_movable")
ONLINE_POLICIES = ("contig-zones", "auto-movable")
THP_MODES = ("always", "madvise", "never")
THP_MIN_PAGES = (512 * MiB) >> PAGE_SHIFT
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = SECTION_SIZE, 64 * GiB

# The largest number in a list of CPUs or nodes.
MAX_LIST_NUMBER = 8191

_SUFFIX = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}

# What the pages of a pageblock are whose own records are still zero (the engine's FILL_*).
FILL_NONE, FILL_RESERVED, FILL_VMEMMAP, FILL_KERNEL = range(4)

# Marks in the engine's page records, and what its state bytes say of the block that starts there.
PG_RESERVED, PG_SLAB, PG_LRU, PG_OWNER_PRIV, PG_HWPOISON = (1 << bit for bit in range(5))
PG_OFFLINE, PG_MOVABLE_OPS, PG_TAKEN, PG_USER, PG_ACTIVE = (1 << bit for bit in range(5, 10))
PG_REFERENCED, PG_DIRTY, PG_WRITEBACK, PG_MLOCKED = (1 << bit for bit in range(10, 14))
PG_PINNED, PG_ISOLATED = 1 << 14, 1 << 15
STATE_ORDER, STATE_MARKED, STATE_ALLOCATED, STATE_PCP, STATE_BUDDY = 0xF, 0x10, 0x20, 0x40, 0x80

# What uses pages (the engine's USER_*), and the bits of a user's slots.
USER_ANON, USER_SHMEM, USER_FILE = 1, 2, 3
USER_SLAB_RECLAIMABLE, USER_SLAB_UNRECLAIMABLE = 4, 5
USER_STACK, USER_PAGE_TABLE, USER_KERNEL = 6, 7, 8
USER_MOVABLE_OPS, USER_OFFLINE, USER_HUGETLB = 9, 10, 11
SLOT_PFN = (1 << 40) - 1
SLOT_YOUNG, SLOT_HUGE, SLOT_PRESENT, SLOT_SWAPPED = 1 << 60, 1 << 61, 1 << 62, 1 << 63

# What became of each page of a list that migrates (the engine's MIGRATE_*).
MIGRATE_PENDING, MIGRATE_DONE, MIGRATE_AGAIN, MIGRATE_FAILED, MIGRATE_GONE = range(5)
#: How long a migration may wait (include/linux/migrate_mode.h).
MIGRATE_ASYNC, MIGRATE_SYNC_LIGHT, MIGRATE_SYNC = range(3)

# Bits of /proc/kpageflags words that kmm shows; of an anonymous page MAPPEDTODISK says that it is
# nobody else's.
KPF_REFERENCED, KPF_UPTODATE, KPF_DIRTY, KPF_LRU = 1 << 2, 1 << 3, 1 << 4, 1 << 5
KPF_ACTIVE, KPF_SLAB, KPF_WRITEBACK, KPF_BUDDY = 1 << 6, 1 << 7, 1 << 8, 1 << 10
KPF_MMAP, KPF_ANON, KPF_SWAPBACKED = 1 << 11, 1 << 12, 1 << 14
KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_HUGE = 1 << 15, 1 << 16, 1 << 17
KPF_UNEVICTABLE, KPF_HWPOISON, KPF_NOPAGE = 1 << 18, 1 << 19, 1 << 20
KPF_THP, KPF_OFFLINE, KPF_PGTABLE = 1 << 22, 1 << 23, 1 << 26
KPF_RESERVED, KPF_MLOCKED, KPF_MAPPEDTODISK = 1 << 32, 1 << 33, 1 << 34
KPF_PRIVATE, KPF_OWNER_PRIVATE = 1 << 35, 1 << 37

# Where the kernel image of the reference build (Debian's 6.1, without address randomisation)
# lies, bytes: from its first section to the end of its bss, and the sections that /proc/iomem
# names, with their last byte.
KERNEL_START, KERNEL_END = 0x1000000, 0x4400000
KERNEL_SECTIONS = (
    ("Kernel code", 0x1000000, 0x1E01D31),
    ("Kernel rodata", 0x2000000, 0x28EAFFF),
    ("Kernel data", 0x2A00000, 0x2C4897F),
    ("Kernel bss", 0x3310000, 0x43FFFFF),
)
# Pages that the reference build keeps besides its memmap in a 1 GiB guest (software I/O TLB, hash
# tables, image, initrd), as its boot messages show.
RESERVED_PAGES = 28505


def whole_number(value: object) -> int | None:
    """Return a number of any integer type (NumPy's too) as a plain one; None for all else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def parse_size(value: object, field_name: str) -> int:
    """Return a number of bytes.

    :param value: an int of bytes, or text such as ``"512M"`` (K, M, G, T; powers of 1024).
    :param field_name: named in the error.
    :raises ConfigError: for anything else.
    """
    number = whole_number(value)
    if number is not None and number >= 0:
        return number
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})\s*([KMGT]?)(?:iB|B)?\s*", value)
        if match:
            return int(match[1], 16 if match[1].startswith("0x") else 10) * _SUFFIX[match[2]]
    raise ConfigError(
        f"{field_name}: {shown(value)} is not a size; "
        "allowed: bytes as a number, or text like '512M', with K, M, G or T"
    )


def parse_list(text: str, field_name: str) -> tuple[int, ...]:
    """Return the numbers of a kernel list such as ``0-1,4`` (``+`` separates too).

    :raises ConfigError: if the text is not such a list.
    """
    out: list[int] = []
    for part in filter(None, re.split(r"[,+\s]", text)):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last > MAX_LIST_NUMBER:
            raise ConfigError(
                f"{field_name}: {shown(text)} is not a list; allowed: like '0-1' or '0,2', "
                f"up to {MAX_LIST_NUMBER}"
            )
        out.extend(range(first, last + 1))
    return tuple(out)


def format_list(numbers: Sequence[int]) -> str:
    """Return numbers in the kernel's list format (``0-1,4``)."""
    out: list[str] = []
    ordered = sorted(numbers)
    i = 0
    while i < len(ordered):
        j = i
        while j + 1 < len(ordered) and ordered[j + 1] == ordered[j] + 1:
            j += 1
        out.append(str(ordered[i]) if i == j else f"{ordered[i]}-{ordered[j]}")
        i = j + 1
    return ",".join(out)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One proximity domain of the firmware: its CPUs and the bytes of RAM it has at boot.

    ``soft_reserved`` bytes more are special-purpose memory, which the kernel leaves to the dax bus.
    """

    cpus: tuple[int, ...] = ()
    memory: int = 0
    soft_reserved: int = 0


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What a machine is built from; sizes in bytes; checked when a Machine is built from it.

    ``srat`` says what firmware tells of memoryless domains: ``"qemu"`` announces the
    hot-pluggable area for the last domain alone, so a DIMM on another domain without CPUs and
    memory lands on the node of the first block, as it does under QEMU; ``"full"`` announces
    every domain; ``"numbered"``, not for descriptions, makes each domain the node of its number.
    ``probe`` and ``memory_failure`` are CONFIG_ARCH_MEMORY_PROBE and
    CONFIG_MEMORY_FAILURE; ``probe_add`` lets the probe file take the word ``add``.  ``seed`` names
    the machine among those of the same description; nothing of it is random so far.
    ``hypervisor`` says whether the kernel finds itself a guest, which decides its block size from
    64 GiB on; ``struct_page_size`` is 64 bytes with memory cgroups, 56 without; ``swap`` is the
    size of the swap device, 0 for none; ``pdpe1gb`` says whether the CPUs have pages of 1 GiB.
    """

    memory: int = GiB
    maxmem: int = 16 * GiB
    slots: int = 16
    cpus: int = 1
    nodes: tuple[NodeConfig, ...] = (NodeConfig((0,), GiB),)
    distances: tuple[tuple[int, ...], ...] = ()
    cmdline: str = ""
    block_size: int | None = None
    seed: int = 0
    srat: str = "qemu"
    probe: bool = True
    probe_add: bool = False
    memory_failure: bool = True
    hypervisor: bool = True
    struct_page_size: int = 64
    swap: int = 0
    pdpe1gb: bool = True
    zones: tuple[int, ...] = (0, 1, 2, 3, 4)
    cmdline_items: tuple[tuple[str, str | None], ...] = field(default=(), compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MachineConfig:
        """Build a configuration from the ``machine`` object of a recording or scenario.

        :param data: keys ``memory``, ``maxmem``, ``slots``, ``cpus``, ``nodes``, ``distances``,
            ``cmdline``, ``block_size`` (bytes), ``seed``, ``srat``, ``probe``, ``probe_add``,
            ``hypervisor``, ``struct_page_size`` (bytes), ``swap`` (size, 0 for none).
        :raises ConfigError: naming the field, its value and what is allowed.
        """
        from kmm.config import config_from_dict

        return config_from_dict(data)
