"""The kernel's own memory notifiers that matter to a user (cpuset, mm/mmap.c, error injection)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kmm import _watermarks
from kmm.cpuset import cpuset_hotplug_workfn
from kmm.memory_block import (
    ACTION_NAMES,
    MEM_OFFLINE,
    MEM_ONLINE,
    MemoryNotifier,
    MemoryNotify,
    register_memory_notifier,
)
from kmm.trace import traced

if TYPE_CHECKING:
    from kmm.machine import Machine

INJECTABLE = ("MEM_GOING_ONLINE", "MEM_GOING_OFFLINE")


def _free_kbytes(m: Machine) -> int:
    return _watermarks.sum_of_free_pages(m.memmap_engine) * 4


@traced
def cpuset_track_online_nodes(m: Machine, action: int, arg: MemoryNotify) -> int:
    """Let the top cpuset follow the nodes that have memory."""
    cpuset_hotplug_workfn(m)
    return 0


def reserve_mem_notifier(m: Machine, action: int, arg: MemoryNotify) -> int:
    """Keep the user's and the administrator's reserve in proportion to free memory."""
    free = _free_kbytes(m)
    if action == MEM_ONLINE:
        if 0 < m.vm.user_reserve_kbytes < 1 << 17:
            m.vm.user_reserve_kbytes = min(free // 32, 1 << 17)
        if 0 < m.vm.admin_reserve_kbytes < 1 << 13:
            m.vm.admin_reserve_kbytes = min(free // 32, 1 << 13)
    elif action == MEM_OFFLINE:
        if m.vm.user_reserve_kbytes > free:
            m.vm.user_reserve_kbytes = min(free // 32, 1 << 17)
            m.printk(f"vm.user_reserve_kbytes reset to {m.vm.user_reserve_kbytes}")
        if m.vm.admin_reserve_kbytes > free:
            m.vm.admin_reserve_kbytes = min(free // 32, 1 << 13)
            m.printk(f"vm.admin_reserve_kbytes reset to {m.vm.admin_reserve_kbytes}")
    return 0


def notifier_err_inject(m: Machine, action: int, arg: MemoryNotify) -> int:
    """Refuse what debugfs was told to refuse (CONFIG_MEMORY_NOTIFIER_ERROR_INJECT)."""
    name = ACTION_NAMES[action]
    code = m.notifier_errors.get(name, 0) if name in INJECTABLE else 0
    if code:
        m.printk(f"Injecting error ({code}) to {name}")
    return code


def _agrees(m: Machine, arg: MemoryNotify) -> int:
    return 0


def _injected(m: Machine, arg: MemoryNotify) -> int:
    return m.notifier_errors.get("MEM_GOING_OFFLINE", 0)


def register_boot_notifiers(m: Machine) -> None:
    """Subscribe the kernel's own notifiers, and size the reserves that they keep."""
    free = _free_kbytes(m)
    m.vm.user_reserve_kbytes = min(free // 32, 1 << 17)
    m.vm.admin_reserve_kbytes = min(free // 32, 1 << 13)
    register_memory_notifier(
        m, MemoryNotifier("cpuset", cpuset_track_online_nodes, 10, asks=_agrees)
    )
    register_memory_notifier(m, MemoryNotifier("reserve", reserve_mem_notifier, 0, asks=_agrees))
    inject = MemoryNotifier("notifier-error-inject", notifier_err_inject, 0, asks=_injected)
    register_memory_notifier(m, inject)
