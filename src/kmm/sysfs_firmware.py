"""The module memory_hotplug, /sys/firmware and debugfs."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from kmm.errors import kernel_error
from kmm.notifiers import INJECTABLE
from kmm.params import ONLINE_POLICIES
from kmm.sysfs_entry import (
    NUMBER,
    Entry,
    directory,
    kstrtobool,
    kstrtoull,
    readonly,
    synthetic_uevent,
    word,
)
from kmm.vmstat import extfrag_index, unusable_index

if TYPE_CHECKING:
    from kmm.machine import Machine

MODULE = "/sys/module/memory_hotplug/parameters"
MODULE_PATH = "/module/memory_hotplug"
MEMMAP = "/sys/firmware/memmap"
EXTFRAG = "/sys/kernel/debug/extfrag"
INJECT = "/sys/kernel/debug/notifier-error-inject/memory/actions"

MAX_ERRNO = 4095


def _policy_store(m: Machine, text: str) -> None:
    if word(text) not in ONLINE_POLICIES:
        raise kernel_error(
            -errno.EINVAL, f"online_policy: {word(text)!r}; allowed: {', '.join(ONLINE_POLICIES)}"
        )
    m.online_policy = word(text)


def _ratio_store(m: Machine, text: str) -> None:
    m.auto_movable_ratio = kstrtoull(text, 32)


def _numa_aware_store(m: Machine, text: str) -> None:
    m.auto_movable_numa_aware = kstrtobool(text)


def _parameter(m: Machine, match: re.Match[str]) -> Entry | None:
    return {
        "online_policy": Entry(0o644, lambda m: m.online_policy + "\n", _policy_store),
        "auto_movable_ratio": Entry(0o644, lambda m: f"{m.auto_movable_ratio}\n", _ratio_store),
        "auto_movable_numa_aware": Entry(
            0o644, lambda m: "Y\n" if m.auto_movable_numa_aware else "N\n", _numa_aware_store
        ),
        "memmap_on_memory": readonly(lambda m: "Y\n" if m.memmap_on_memory else "N\n"),
    }.get(match[1])


def _memmap_file(m: Machine, match: re.Match[str]) -> Entry | None:
    entry = m.firmware_map.get(int(match[1]))
    if entry is None:
        return None
    texts = {"start": f"{entry[0]:#x}\n", "end": f"{entry[1]:#x}\n", "type": f"{entry[2]}\n"}
    return readonly(lambda m: texts[match[2]]) if match[2] in texts else None


def _memmap_dir(m: Machine, match: re.Match[str]) -> Entry | None:
    if match[1] is None:
        return directory(str(k) for k in m.firmware_map)
    return directory(("end", "start", "type")) if int(match[1]) in m.firmware_map else None


def _acpi_enabled_store(m: Machine, text: str) -> None:
    match = re.fullmatch(r"\+?0*([01])\n?", text)
    if not match:
        raise kernel_error(-errno.EINVAL, f"enabled: {word(text)!r}; allowed: 0, 1")
    m.acpi_memory_enabled = match[1] == "1"


def _acpi_profile(m: Machine, match: re.Match[str]) -> Entry | None:
    """The profile of memory devices, which acpi_no_memhotplug leaves out."""
    if match[1] is None:
        return directory(("memory",) if m.acpi_memhotplug else ())
    if not m.acpi_memhotplug:
        return None
    if match[2] is None:
        return directory(("enabled",))
    return Entry(0o644, lambda m: f"{int(m.acpi_memory_enabled)}\n", _acpi_enabled_store)


def _inject_file(m: Machine, match: re.Match[str]) -> Entry | None:
    name = match[1]
    if name not in INJECTABLE:
        return None

    def store(m: Machine, text: str) -> None:
        negative = text.startswith("-")
        number = kstrtoull(text[1:] if negative else text, 63)
        # What is no errno becomes the nearest one; a positive number is none at all.
        m.notifier_errors[name] = -min(number, MAX_ERRNO) if negative else 0

    return Entry(0o644, lambda m: f"{m.notifier_errors.get(name, 0)}\n", store)


ENTRIES = (
    (rf"{MODULE}/(\w+)", _parameter),
    (
        f"/sys{MODULE_PATH}/uevent",
        lambda m, _: Entry(0o200, write=lambda m, t: synthetic_uevent(m, MODULE_PATH, "module", t)),
    ),
    (rf"{MEMMAP}(?:/{NUMBER})?", _memmap_dir),
    (rf"{MEMMAP}/{NUMBER}/(\w+)", _memmap_file),
    (r"/sys/firmware/acpi/hotplug(?:/(memory)(?:/(enabled))?)?", _acpi_profile),
    (rf"{INJECT}/(\w+)/error", _inject_file),
    (rf"{INJECT}/(?:{'|'.join(INJECTABLE)})", lambda m, _: directory(("error",))),
    (rf"{EXTFRAG}/unusable_index", lambda m, _: readonly(unusable_index)),
    (rf"{EXTFRAG}/extfrag_index", lambda m, _: readonly(extfrag_index)),
)

DIRECTORIES: dict[str, tuple[str, ...]] = {
    "/sys/devices/LNXSYSTM:00": ("LNXSYBUS:00",),
    "/sys/devices/system": ("container", "cpu", "memory", "node"),
    "/sys/module/memory_hotplug": ("parameters", "uevent"),
    MODULE: ("auto_movable_numa_aware", "auto_movable_ratio", "memmap_on_memory", "online_policy"),
    "/sys/firmware": ("acpi", "memmap"),
    "/sys/firmware/acpi": ("hotplug",),
    "/sys/kernel": ("debug", "mm"),
    "/sys/kernel/debug": ("extfrag", "notifier-error-inject"),
    EXTFRAG: ("extfrag_index", "unusable_index"),
    "/sys/kernel/debug/notifier-error-inject": ("memory",),
    "/sys/kernel/debug/notifier-error-inject/memory": ("actions",),
    INJECT: INJECTABLE,
}
