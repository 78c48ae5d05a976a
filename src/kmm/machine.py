"""A machine: all state in one place, and thin methods over it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt

from kmm import _memmap, gup, memory_views
from kmm._allocator import PageAllocator
from kmm._memory import page_owner
from kmm.acpi_memhotplug import CONTAINER_HID, AcpiDevice, acpi_unbind_one
from kmm.acpi_scan import (
    ACPI_NOTIFY_DEVICE_CHECK,
    ACPI_NOTIFY_EJECT_REQUEST,
    NOTIFY_EVENTS,
    acpi_device_hotplug,
)
from kmm.arch_x86_64 import arch_add_memory, arch_remove_memory
from kmm.clock import SECOND, Clock, Ratelimit
from kmm.compaction import Kcompactd, try_to_compact_pages, watch_fragmentation
from kmm.config import check_config
from kmm.contig_alloc import alloc_contig_pages, alloc_contig_range, free_contig_range
from kmm.dax_bus import DaxDriver, DevDax, dax_drivers
from kmm.debug import dump_page
from kmm.errors import (
    FirmwareRefused,
    KernelError,
    check_number,
    check_text,
    kernel_error,
    shown,
)
from kmm.firmware import Dimm, check_crs, check_modules, check_plug, pxm_to_node_map
from kmm.gfp import gfp_zone
from kmm.kswapd import Kswapd, run_kswapds
from kmm.memory_block import MemoryBlock, MemoryNotifier
from kmm.memory_hotplug import memory_block_offline, memory_block_online
from kmm.migrate import Scratch
from kmm.mmzone import MemoryGroup, PgData, Zone, zone_index
from kmm.offline_report import OfflineAttempt, OfflineReport, offline_pages_report
from kmm.oom_kill import out_of_memory
from kmm.page_alloc import __alloc_pages, __free_pages
from kmm.page_writeback import sync
from kmm.params import (
    DEFAULT_LOWMEM_RESERVE_RATIO,
    FREE_RECORDS_KEPT,
    LOCAL_DISTANCE,
    MAX_NR_ZONES,
    NR_PAGES_MAX,
    PAGE_SHIFT,
    PFN_SECTION_SHIFT,
    PMD_SIZE,
    REMOTE_DISTANCE,
    MachineConfig,
    MiB,
)
from kmm.records import Records
from kmm.resource import ResourceTree
from kmm.rules import LINUX_6_1, Rules
from kmm.swapfile import SwapInfo, swapon
from kmm.trace import Kprobes
from kmm.vmscan import try_to_free_pages

if TYPE_CHECKING:
    from kmm.balloon_compaction import Balloon
    from kmm.cpuset import CpuSet
    from kmm.gup import Pin
    from kmm.hugetlb import HState
    from kmm.memory import User
    from kmm.offline_explanation import Explanation
    from kmm.saved_texts import SavedText
    from kmm.sparse import VmemAltmap


@dataclass(slots=True)
class VmSysctl:
    """The tunables of /proc/sys/vm that the model works with."""

    min_free_kbytes: int = 1024
    user_min_free_kbytes: int = -1
    watermark_scale_factor: int = 10
    watermark_boost_factor: int = 15000
    lowmem_reserve_ratio: list[int] = field(
        default_factory=lambda: list(DEFAULT_LOWMEM_RESERVE_RATIO)
    )
    percpu_pagelist_high_fraction: int = 0
    user_reserve_kbytes: int = 131072
    admin_reserve_kbytes: int = 8192
    dirty_ratio: int = 20
    dirty_background_ratio: int = 10
    dirty_bytes: int = 0
    dirty_background_bytes: int = 0
    overcommit_ratio: int = 50
    overcommit_kbytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    thp_enabled: str = "always"
    thp_available: bool = True


@dataclass(slots=True)
class Ops:
    """Where code that the kernel calls upward plugs in: arch hooks, block devices, reclaim."""

    arch_add_memory: Callable[[Machine, int, int, int, VmemAltmap | None], None]
    arch_remove_memory: Callable[[Machine, int, int], None]
    memory_block_online: Callable[[Machine, MemoryBlock], None]
    memory_block_offline: Callable[[Machine, MemoryBlock], None]
    device_platform_notify_remove: Callable[[Machine, MemoryBlock], None]
    try_to_compact_pages: Callable[[Machine, int, int, int, int, int, int, int], tuple[int, int]]
    try_to_free_pages: Callable[[Machine, int, int, int, int, int], int]
    out_of_memory: Callable[[Machine, int, int, int], bool]
    alloc_contig_pages: Callable[[Machine, int, int, int, Collection[int] | None], int]
    free_contig_range: Callable[[Machine, int, int], None]


class Machine(PageAllocator):
    """A modelled computer with its firmware, its kernel and its memory.

    :param config: a MachineConfig; the machine boots at once.
    :raises ConfigError: naming the field, its value and what is allowed.
    """

    def __init__(self, config: MachineConfig | None = None) -> None:
        self._prepare(check_config(MachineConfig() if config is None else config))
        from kmm.boot import boot

        boot(self)

    @classmethod
    def from_files(
        cls, files: Mapping[str, str], config: MachineConfig | Mapping[str, Any] | None = None
    ) -> Machine:
        """Build the machine that texts of /proc and /sys describe.

        :param files: path to text, at least /proc/iomem, zoneinfo, buddyinfo, pagetypeinfo.
        :param config: what files do not tell (DIMM slots, distances of absent nodes, kernel
            parameters): a MachineConfig or the ``machine`` object of a recording.
        :raises ConfigError: naming the file and what is wrong in it.
        """
        from kmm.from_files import boot_from_files

        m = cls.__new__(cls)
        boot_from_files(m, files, config)
        return m

    def _prepare(self, config: MachineConfig) -> None:
        self.config = config
        self.rules: Rules = LINUX_6_1
        self.ops = Ops(
            arch_add_memory,
            arch_remove_memory,
            memory_block_online,
            memory_block_offline,
            acpi_unbind_one,
            try_to_compact_pages,
            try_to_free_pages,
            out_of_memory,
            alloc_contig_pages,
            free_contig_range,
        )
        self.nr_cpus = config.cpus
        self.log: list[str] = []
        self.uevents: list[str] = []
        self.swallowed: list[tuple[str, KernelError]] = []
        # Files that are shown in the words of the machine they were saved on, by path.
        self.saved_texts: dict[str, SavedText] = {}
        self._prepare_parameters(config)
        self._prepare_records(config)
        self._prepare_devices(config)

    def _prepare_parameters(self, config: MachineConfig) -> None:
        self.vm = VmSysctl()
        self.mhp_default_online_type = 0
        self.memmap_on_memory = False
        self.online_policy = "contig-zones"
        self.auto_movable_ratio = 301
        self.auto_movable_numa_aware = True
        self.movable_node_enabled = False
        self.acpi_memhotplug: bool = True
        self.acpi_memory_enabled: bool = True
        self.block_size = 128 * MiB

    def _prepare_records(self, config: MachineConfig) -> None:
        self.records = Records()
        self.memmap = self.records.memmap
        self.page_states = self.records.page_states
        self.pageblocks = self.records.pageblocks
        self.sections = self.records.sections
        self.pxm_to_node = pxm_to_node_map(config)
        self._pxm_of_node = {nid: pxm for pxm, nid in self.pxm_to_node.items()}
        nr_nodes = max(self.pxm_to_node.values(), default=0) + 1
        self._cpus_of_node: dict[int, tuple[int, ...]] = {
            nid: config.nodes[pxm].cpus for pxm, nid in self.pxm_to_node.items()
        }
        node_of_cpu = {cpu: nid for nid, cpus in self._cpus_of_node.items() for cpu in cpus}
        self._node_of_cpu = [node_of_cpu.get(cpu, 0) for cpu in range(self.nr_cpus)]
        self.memmap_engine = _memmap.MemMap(
            self.memmap,
            self.page_states,
            self.pageblocks,
            self.sections,
            nr_nodes * MAX_NR_ZONES,
            self._node_of_cpu,
            {nid: len(cpus) for nid, cpus in self._cpus_of_node.items()},
            self.records.page_tokens,
        )
        self._attach(self.memmap_engine, FREE_RECORDS_KEPT)
        nr_chunks = (NR_PAGES_MAX * config.struct_page_size) // PMD_SIZE
        self.vmemmap_pfn: npt.NDArray[np.uint64] = np.zeros(nr_chunks, dtype=np.uint64)
        self.vmemmap_users: npt.NDArray[np.uint32] = np.zeros(nr_chunks, dtype=np.uint32)
        self.vmemmap_tables: dict[int, list[int]] = {}
        self.vmemmap_basepages: dict[int, dict[int, int]] = {}
        self.nodes: dict[int, PgData] = {nid: self._new_pgdat(nid) for nid in range(nr_nodes)}
        self._zones = [z for p in self.nodes.values() for z in p.zones]
        self._prepare_globals()

    def _new_pgdat(self, nid: int) -> PgData:
        return PgData(
            nid,
            [
                Zone(self.memmap_engine, zone_index(nid, i), i, self.nr_cpus, nid)
                for i in range(MAX_NR_ZONES)
            ],
        )

    def _prepare_globals(self) -> None:
        self.n_online: set[int] = set()
        self.n_normal_memory: set[int] = set()
        self.n_memory: set[int] = set()
        self.node_load: dict[int, int] = {}
        self.policy_zone = 0
        self.vm_total_pages = 0
        self.totalram_pages = 0
        self.vm_event_states: dict[str, int] = {}  # what the engine does not count (vmstat.py)
        self.totalreserve_pages = 0
        #: What was computed from the sizes of zones since boot; what files tell may be older.
        self.recomputed: set[str] = set()
        self.ratelimit_pages = 32
        self.max_pfn = 0
        self.highest_present_section_nr = -1  # no section above it has ever been there
        self.direct_map_splits = 0  # by the kernel itself, in pieces of 2 MiB; files tell
        self.num_poisoned_pages = 0
        self.hwpoison: set[int] = set()
        self.numa_meminfo: list[tuple[int, int, int]] = [(0, 0, 0)]
        self.kthreads: set[str] = set()
        self.iomem_resource = ResourceTree()
        #: Blocks that are gone while their System RAM stays in the tree (symbols.LEFT_BEHIND).
        self.ram_left_behind: set[int] = set()
        self.nodes_left_behind: set[int] = set()  # online, but without blocks, memory and CPUs

    def _prepare_devices(self, config: MachineConfig) -> None:
        self.memory_blocks: dict[int, MemoryBlock] = {}
        self.memory_groups: dict[int, MemoryGroup] = {}
        self.memory_notifiers: list[MemoryNotifier] = []
        self.notifier_errors: dict[str, int] = {}
        self.node_devices: set[int] = set()
        self.top_cpuset_mems: set[int] = set()
        self.firmware_map: dict[int, tuple[int, int, str]] = {}
        self.firmware_map_next = 0
        self.dimms: dict[str, Dimm] = {}
        self.dimm_backends: set[str] | None = None  # ids that a recording's monitor remembers
        self.ost_events: list[tuple[str, int, int]] = []
        self.acpi_devices: list[AcpiDevice] = [
            AcpiDevice(f"PNP0C80:{slot:02x}") for slot in range(config.slots)
        ]
        self.acpi_containers: dict[str, AcpiDevice] = {}
        self.dax_devices: dict[str, DevDax] = {}
        self.dax_drivers: dict[str, DaxDriver] = dax_drivers()
        self.sysfs_values: dict[str, str] = {}
        self._prepare_users()

    def _prepare_users(self) -> None:
        self.users: dict[str, User] = {}
        self.users_by_number: dict[int, User] = {}
        self.hstates: list[HState] = []  # the pools of huge pages
        self.default_hstate_idx = 0
        self.hugetlb_shm_group = 0
        self.cpusets: dict[str, CpuSet] = {}  # all but the top one, parents first
        self.clock = Clock()
        self.kcompactds: dict[int, Kcompactd] = {}
        watch_fragmentation(self)
        #: How long an offline that does not get on is tried, ns of the clock.
        self.offline_patience = 60 * SECOND
        self.signal_pending = False  # for whoever waits for an offline
        self.migrate_ratelimit = Ratelimit()
        self.pins: dict[int, list[Pin]] = {}  # by pageblock (gup.py)
        self.balloons: list[Balloon] = []
        self.offline_report: OfflineReport | None = None
        self.scratch = Scratch()
        self._prepare_reclaim()

    def _prepare_reclaim(self) -> None:
        self.swap: SwapInfo | None = None
        self.shrinkers: dict[str, User] = {}
        self.kswapds: dict[int, Kswapd] = {}
        self.current: User | None = None  # whose task runs
        self.reclaiming = False  # PF_MEMALLOC of who runs
        #: How long the backing store takes to write pages, ns of the clock.
        self.writeback_delay = 0
        self.nopage_ratelimit = Ratelimit(10 * SECOND, 1)
        self.oom_ratelimit = Ratelimit()

    # -- what everybody asks ----------------------------------------------------------

    def all_zones(self) -> list[Zone]:
        """Every zone of every possible node, by node and index."""
        return self._zones

    def cpus_of_node(self, nid: int) -> tuple[int, ...]:
        """The CPUs of a node."""
        return self._cpus_of_node.get(nid, ())

    def this_node(self) -> int:
        """The node of the CPU that runs."""
        return self.node_of_cpu(self.this_cpu)

    def node_of_cpu(self, cpu: int) -> int:
        """The node of a CPU."""
        return self._node_of_cpu[cpu]

    def node_distance(self, a: int, b: int) -> int:
        """The SLIT distance of two nodes."""
        pxm, matrix = self._pxm_of_node, self.config.distances
        if matrix and a in pxm and b in pxm:
            return matrix[pxm[a]][pxm[b]]
        return LOCAL_DISTANCE if a == b else REMOTE_DISTANCE

    @property
    def block_pages(self) -> int:
        """Pages of a memory block."""
        return self.block_size >> PAGE_SHIFT

    def section_flags(self, pfn: int) -> int:
        """The SECTION_* flags of the section that holds a page."""
        return int(self.sections["flags"][pfn >> PFN_SECTION_SHIFT])

    def page_zone(self, pfn: int) -> Zone | None:
        """The zone that a page was last put into."""
        index = int(self.pageblocks["zone"][pfn >> 9])
        return self._zones[index - 1] if index else None

    def user_of(self, pfn: int) -> User | None:
        """Who uses a page, if that is known; of a large block any of its pages."""
        number, _ = page_owner(self.memmap_engine, pfn)
        return self.users_by_number.get(number)

    @property
    def default_hstate(self) -> HState:
        """The pool of huge pages that /proc shows."""
        return self.hstates[self.default_hstate_idx]

    def describe_page(self, pfn: int) -> str:
        """Who uses a page, in words."""
        number, index = page_owner(self.memmap_engine, pfn)
        user = self.users_by_number.get(number)
        return f"{user.name!r}, page {index}" if user is not None else "an unknown user"

    def count_vm_event(self, name: str, times: int = 1) -> None:
        """Count an event of /proc/vmstat that the engine does not count itself."""
        self.vm_event_states[name] = self.vm_event_states.get(name, 0) + times

    def set_node_online(self, nid: int, online: bool = True) -> None:
        """Set or clear a node's bit in N_ONLINE."""
        (self.n_online.add if online else self.n_online.discard)(nid)
        self.memmap_engine.nr_online_nodes = len(self.n_online)

    # -- what the kernel says ---------------------------------------------------------

    def printk(self, line: str) -> None:
        """Write a line to the kernel log."""
        self.log.append(line)

    def uevent(self, action: str, devpath: str, subsystem: str) -> None:
        """Send a uevent to user space."""
        self.uevents.append(f"{action} {devpath} {subsystem}")

    def note_swallowed(self, where: str, error: KernelError) -> None:
        """Keep an error that the kernel drops, for those who want to know why."""
        seen: BaseException | None = error
        while seen is not None:  # a traceback would keep every frame alive that it went through
            seen.__traceback__, seen = None, seen.__context__
        self.swallowed.append((where, error))

    def dump_page(self, pfn: int, reason: str) -> None:
        """Log the page that stands in the way, as dump_page does."""
        dump_page(self, pfn, reason)

    def ost(self, device: AcpiDevice, source: int, status: int) -> None:
        """Give firmware an _OST answer."""
        name = device.dimm.dimm_id if device.dimm is not None else ""
        self.ost_events.append((name, source, status))

    # -- small state that has no mechanism of its own ----------------------------------

    def firmware_map_add(self, start: int, end: int, kind: str) -> None:
        """Add an entry to /sys/firmware/memmap; numbers are never used twice."""
        self.firmware_map[self.firmware_map_next] = (start, end, kind)
        self.firmware_map_next += 1

    def firmware_map_remove(self, start: int, end: int, kind: str) -> None:
        """Remove the entry that matches exactly, if there is one."""
        for number, entry in list(self.firmware_map.items()):
            if entry == (start, end, kind):
                del self.firmware_map[number]
                return

    def forget_pages(self, pfn: int, nr_pages: int) -> None:
        """Zero the records of pages that are gone and give their host memory back.

        :param pfn: first pfn; nr_pages: pages, both multiples of 512.
        """
        self.records.forget(pfn, nr_pages, bool(self.memmap_engine.dirty_blocks(pfn, nr_pages)))

    # -- firmware events --------------------------------------------------------------

    def plug(
        self,
        dimm_id: str,
        nid: int,
        start: int,
        size: int,
        crs: tuple[tuple[int, int], ...] | None = None,
        sta: int = 0xF,
    ) -> int:
        """Put a DIMM into a slot and notify the kernel.

        :param nid: proximity domain; start, size: bytes; crs: ranges that its _CRS lists, if
            not the one; sta: what its _STA says.
        :return: the _OST status (0 even where the memory could not be added, as the kernel).
        :raises FirmwareRefused: if the platform does not take the DIMM; InvalidArgument: for an
            argument that is not allowed.
        """
        device = self._insert(dimm_id, nid, start, size, crs, sta)
        return acpi_device_hotplug(self, device, ACPI_NOTIFY_DEVICE_CHECK)

    def _insert(
        self,
        dimm_id: str,
        nid: int,
        start: int,
        size: int,
        crs: tuple[tuple[int, int], ...] | None = None,
        sta: int = 0xF,
    ) -> AcpiDevice:
        check_text("dimm_id", dimm_id)
        nid = check_number("nid", nid, 0, (1 << 31) - 1)
        start = check_number("start", start, 0, (1 << 64) - 1)
        size = check_number("size", size, 0, (1 << 64) - 1)
        crs = check_crs(crs)
        sta = check_number("sta", sta, 0, (1 << 32) - 1)
        slot = check_plug(self, dimm_id, nid, start, size)
        device = self.acpi_devices[slot]
        device.dimm = self.dimms[dimm_id] = Dimm(dimm_id, nid, start, size, slot, crs, sta)
        return device

    def plug_container(self, dimms: Sequence[tuple[str, int, int, int]]) -> tuple[str, int]:
        """Put a module with DIMMs in (an ACPI0004 container) in place and notify the kernel.

        :param dimms: (id, proximity domain, start, size) of each, bytes.
        :return: the container's name and the _OST status.
        :raises FirmwareRefused: if the platform does not take one of the DIMMs; InvalidArgument:
            for an argument that is not allowed; none is in then.
        """
        check_modules(dimms)
        placed: list[AcpiDevice] = []
        backends = None if self.dimm_backends is None else set(self.dimm_backends)
        try:
            for dimm_id, nid, start, size in dimms:
                placed.append(self._insert(dimm_id, nid, start, size))
        except (FirmwareRefused, KernelError):
            for device in placed:
                if device.dimm is not None:
                    self.eject_dimm(device.dimm)
                    device.dimm = None
            self.dimm_backends = backends
            raise
        number = next(
            i for i in itertools.count() if f"{CONTAINER_HID}:{i:02x}" not in self.acpi_containers
        )
        container = AcpiDevice(f"{CONTAINER_HID}:{number:02x}", CONTAINER_HID, children=placed)
        self.acpi_containers[container.name] = container
        return container.name, acpi_device_hotplug(self, container, ACPI_NOTIFY_DEVICE_CHECK)

    def unplug_container(self, name: str) -> int:
        """Ask for a container's ejection; user space has to take it offline first.

        :return: the final _OST status: 0 gone, 0x82 busy.
        :raises FirmwareRefused: if there is no such container.
        """
        container = self.acpi_containers.get(check_text("name", name))
        if container is None:
            raise FirmwareRefused(f"Device '{name}' not found")
        return acpi_device_hotplug(self, container, ACPI_NOTIFY_EJECT_REQUEST)

    def unplug(self, dimm_id: str) -> int:
        """Ask for a DIMM's ejection.

        :return: the final _OST status: 0 gone, 0x80 not supported, 0x82 busy.
        :raises FirmwareRefused: if there is no such DIMM.
        """
        return self.notify(dimm_id, "eject_request")

    def notify(self, dimm_id: str, event: str) -> int:
        """Send a notification for a DIMM that is in its slot.

        What its _STA and _EJ0 then say is set at ``m.dimms[dimm_id]`` (see firmware.Dimm).

        :param event: ``bus_check``, ``device_check`` or ``eject_request``.
        :return: the final _OST status.
        :raises FirmwareRefused: if there is no such DIMM; InvalidArgument: for another event.
        """
        if check_text("event", event) not in NOTIFY_EVENTS:
            raise kernel_error(-22, f"event: {event!r}; allowed: {', '.join(NOTIFY_EVENTS)}")
        dimm = self.dimms.get(check_text("dimm_id", dimm_id))
        if dimm is None:
            raise FirmwareRefused(f"Device '{dimm_id}' not found")
        return acpi_device_hotplug(self, self.acpi_devices[dimm.slot], NOTIFY_EVENTS[event])

    def eject_dimm(self, dimm: Dimm) -> None:
        """The platform's part of _EJ0: the slot is empty."""
        self.dimms.pop(dimm.dimm_id, None)

    # -- files ------------------------------------------------------------------------

    def read(self, path: str) -> str:
        """Return the text of a file of /proc or /sys.

        :raises KernelError: ENOENT, EACCES, EISDIR as the kernel.
        """
        from kmm.sysfs import read

        return read(self, check_text("path", path))

    def write(self, path: str, value: str) -> None:
        """Write a value (a newline is added) to a file of /proc or /sys.

        :raises KernelError: the errno that the writer would see.
        """
        from kmm.sysfs import write

        write(self, check_text("path", path), check_text("value", value))

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory of /proc or /sys, sorted.

        :raises NoSuchFile: if there is none at the path; NotADirectory: if it is a file.
        """
        from kmm.sysfs import listdir

        return listdir(self, check_text("path", path))

    def free_blocks(self) -> npt.NDArray[np.int64]:
        """Return free blocks by [node, zone index, migratetype, order], as pagetypeinfo shows."""
        return memory_views.free_blocks(self)

    def kpageflags(self, pfn: int, count: int) -> npt.NDArray[np.uint64]:
        """Return /proc/kpageflags of a range: a uint64 word (params.KPF_* bits) a page.

        :param pfn: first page; count: pages.
        """
        return memory_views.kpageflags(self, pfn, count)

    # -- pages ------------------------------------------------------------------------

    def _alloc_slowly(self, order: int, gfp: int, nid: int, cpu: int) -> int:
        """A request that somebody watches, or that has to wait for memory."""
        return _alloc_pages_of(self, gfp, order, nid, None, cpu)

    def _alloc_more(self, order: int, gfp: int, nid: int, cpu: int) -> int | None:
        """One more block for a bulk request; None when there is none."""
        try:
            return _alloc_pages_of(self, gfp, order, nid, None, cpu)
        except KernelError:  # a failure that was ordered may bear any errno
            return None

    def _free_slowly(self, pfn: int, order: int, cpu: int) -> None:
        _free_pages_of(self, pfn, order, cpu)

    def _as_pfns(self, pfns: npt.ArrayLike) -> npt.NDArray[np.uint64]:
        """Return what was given for a bulk free as an array.

        :raises InvalidArgument: if it is not a list of page frame numbers.
        """
        try:
            given = np.asarray(pfns)
            if given.dtype.kind == "f" and not isinstance(pfns, np.ndarray):
                # NumPy makes floats of a list that mixes its own integers with Python's.
                mixed = cast("Sequence[SupportsIndex]", pfns)
                given = np.array([operator.index(p) for p in mixed], dtype=np.uint64)
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise TypeError
            if given.dtype.kind == "i" and given.size and given.min() < 0:
                raise OverflowError
            return np.ascontiguousarray(given, dtype=np.uint64)
        except (ValueError, TypeError, OverflowError):
            what = shown(pfns)
            if isinstance(pfns, np.ndarray):
                what = f"an array of shape {pfns.shape} and dtype {pfns.dtype}"
            raise kernel_error(
                -22, f"pfns: {what}; allowed: a list of numbers from 0 to 2^64 - 1"
            ) from None

    def _before_large_request(self, pages: int, gfp: int, nid: int) -> None:
        """Make the host ready for records that a request is about to write densely.

        :param pages: how many pages are requested; gfp, nid: as for alloc_pages.
        """
        for zone in self.nodes[nid].zonelist:
            free = zone.nr_free_pages
            if zone.zone_idx <= gfp_zone(gfp) and free:
                if 2 * pages < free:
                    break  # who knows where in the zone they will lie
                self.records.expect_pages(zone.zone_start_pfn, zone.zone_end_pfn)
                pages -= free

    def run_kswapds(self) -> None:
        """Let the kswapds that were woken do their work."""
        run_kswapds(self)

    def swapon(self, size: int) -> None:
        """Give the machine a swap device.

        :param size: bytes, the header included.
        :raises KernelError: see swapfile.swapon.
        """
        swapon(self, size)

    def sync(self) -> None:
        """Write all dirty pages of files and wait until the backing store has them."""
        sync(self)

    def give_back_records(self) -> None:
        """Let the host have the memory of page records whose pages are free in large blocks.

        Happens by itself once a zone has many of them, but not while a chain may have to be undone:
        what its records said has to be there to come back to.
        """
        if self.memmap_engine.journaling:
            return
        for zone in self._zones:
            if zone.nr_dirty_free > self.free_records_kept:
                self.records.give_back(zone, self.free_records_kept, self.hwpoison)

    def pin(self, user: User, index: int, long_term: bool = True) -> Pin:
        """Hold a user's page in place until unpin (see gup.pin_user_pages).

        :raises KernelError: InvalidArgument, or OutOfMemory if it cannot leave a Movable zone.
        """
        return gup.pin_user_pages(self, user, index, long_term)

    def unpin(self, pin: Pin) -> None:
        """Let go of what a pin held.

        :raises InvalidArgument: for a pin that does not hold anything (any more).
        """
        gup.unpin_user_page(self, pin)

    def offline_pages_report(self, block_id: int) -> OfflineAttempt:
        """Take a memory block offline and return what became of each of its pages.

        A refusal is told in what is returned: its ``error``.

        :raises InvalidArgument: if there is no such block.
        """
        return offline_pages_report(self, block_id)

    def explain_offline(self, block_id: int) -> Explanation:
        """Say whether a memory block could go offline now, and what is in its way.

        Nothing changes.

        :raises InvalidArgument: if there is no such block.
        """
        from kmm.offline_explain import explain_offline

        return explain_offline(self, block_id)

    def alloc_contig_range(self, start: int, end: int) -> None:
        """Take exactly the pages from start to end - 1 (pfns), as pages of order 0.

        :raises KernelError: see contig_alloc.alloc_contig_range.
        """
        alloc_contig_range(self, start, end)

    def free_contig_range(self, pfn: int, nr_pages: int) -> None:
        """Free a range of pages of order 0.

        :raises KernelError: if one of them is not allocated.
        """
        free_contig_range(self, pfn, nr_pages)

    def trace(self, recording: bool = True) -> Kprobes:
        """Start recording call chains and return the recorder; its ``calls`` fill up.

        Orders to fail that were given before stand.
        """
        self.kprobes = Kprobes(recording, self.kprobes)
        return self.kprobes

    def validate(self) -> None:
        """Recount everything the slow way.

        :raises ValidationError: at the first disagreement.
        """
        from kmm.validate import validate

        validate(self)


# A class body would mangle the leading underscores.
_alloc_pages_of = __alloc_pages
_free_pages_of = __free_pages
