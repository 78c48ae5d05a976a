"""The dax bus with its devices and drivers, and the platform devices that hold them.

Followed: drivers/dax/bus.c, drivers/dax/hmem, drivers/base/bus.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from kmm.dax_bus import (
    DAX_MAJOR,
    DevDax,
    bind_store,
    new_id_store,
    remove_id_store,
    unbind_store,
)
from kmm.params import PMD_SIZE
from kmm.sysfs_entry import (
    NUMBER,
    POWER,
    Entry,
    directory,
    link,
    power_file,
    readonly,
    synthetic_uevent,
)

if TYPE_CHECKING:
    from kmm.machine import Machine

BUS, PLATFORM = "/sys/bus/dax", "/sys/devices/platform"
_STORES = {
    "bind": bind_store,
    "unbind": unbind_store,
    "new_id": new_id_store,
    "remove_id": remove_id_store,
}
_MODULES = {"device_dax": "dax:device_dax", "kmem": "dax:kmem", "dax_hmem": "platform:hmem"}
Show = Callable[["Machine"], str]


def _device(m: Machine, region: str) -> DevDax | None:
    return m.dax_devices.get(f"dax{region}.0")


def _secret(show: Show) -> Entry:
    """A file that only root can read (0400)."""
    return Entry(0o400, show)


def _names(m: Machine, match: re.Match[str]) -> Entry:
    return directory(m.dax_devices)


def _regions(m: Machine) -> list[str]:
    return [f"hmem.{d.region}" for d in m.dax_devices.values()]


def _bus_device(m: Machine, match: re.Match[str]) -> Entry | None:
    device = m.dax_devices.get(match[1])
    return None if device is None else link(f"../../..{device.devpath}")


def _driver(m: Machine, match: re.Match[str]) -> Entry | None:
    driver, name = m.dax_drivers.get(match[1]), match[2]
    if driver is None or not loaded(m):
        return None
    if name is None:
        bound = (d.name for d in m.dax_devices.values() if d.driver == driver.name)
        return directory([*_STORES, "module", "uevent", *bound])
    if name in _STORES:
        return Entry(0o200, write=lambda m, t: _STORES[name](m, driver, t))
    if name == "module":
        return link(f"../../../../module/{driver.name}")
    if name == "uevent":
        path = f"/bus/dax/drivers/{driver.name}"
        return Entry(0o200, write=lambda m, t: synthetic_uevent(m, path, "drivers", t))
    device = m.dax_devices.get(name)
    if device is None or device.driver != driver.name:
        return None
    return link(f"../../../..{device.devpath}")


def _hmem_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device, name = _device(m, match[1]), match[2]
    if device is None:
        return None
    if name is None:
        names = ["dax_region", "driver", "modalias", "numa_node", "power", "subsystem", "uevent"]
        return directory([*names, device.name])
    path = f"/devices/platform/hmem.{device.region}"
    return {
        "driver": link("../../../bus/platform/drivers/hmem"),
        "modalias": readonly(lambda m: "platform:hmem\n"),
        "numa_node": readonly(lambda m: f"{device.numa_node}\n"),
        "power": directory(POWER),
        "subsystem": link("../../../bus/platform"),
        "uevent": Entry(
            0o644,
            lambda m: "DRIVER=hmem\nMODALIAS=platform:hmem\n",
            lambda m, t: synthetic_uevent(m, path, "platform", t),
        ),
    }.get(name)


def _region_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device = _device(m, match[1])
    if device is None:
        return None
    files = {
        "align": _secret(lambda m: f"{PMD_SIZE}\n"),
        "available_size": readonly(lambda m: "0\n"),
        "id": readonly(lambda m: f"{device.region}\n"),
        "seed": readonly(lambda m: "\n"),
        "size": readonly(lambda m: f"{device.end - device.start}\n"),
    }
    return directory(files) if match[2] is None else files.get(match[2])


def _uevent_text(device: DevDax) -> str:
    driver = [] if device.driver is None else [f"DRIVER={device.driver}"]
    lines = [f"MAJOR={DAX_MAJOR}", f"MINOR={device.region}", f"DEVNAME={device.name}"]
    return "\n".join([*lines, *driver, "MODALIAS=dax:t0"]) + "\n"


def _device_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device, name = _device(m, match[1]), match[2]
    if device is None:
        return None
    files = {
        "align": readonly(lambda m: f"{PMD_SIZE}\n"),
        "dev": readonly(lambda m: f"{DAX_MAJOR}:{device.region}\n"),
        "mapping0": directory(("end", "page_offset", "power", "start", "uevent")),
        "modalias": readonly(lambda m: "dax:t0\n"),
        "numa_node": readonly(lambda m: f"{device.numa_node}\n"),
        "power": directory(POWER),
        "resource": _secret(lambda m: f"{device.start:#x}\n"),
        "size": readonly(lambda m: f"{device.end - device.start}\n"),
        "subsystem": link("../../../../bus/dax"),
        "target_node": readonly(lambda m: f"{device.target_node}\n"),
        "uevent": Entry(
            0o644,
            lambda m: _uevent_text(device),
            lambda m, t: synthetic_uevent(m, device.devpath, "dax", t),
        ),
    }
    if device.driver is not None:
        files["driver"] = link(f"../../../../bus/dax/drivers/{device.driver}")
    return directory(files) if name is None else files.get(name)


def _mapping_file(m: Machine, match: re.Match[str]) -> Entry | None:
    device = _device(m, match[1])
    if device is None:
        return None
    path = f"{device.devpath}/mapping0"
    return {
        "end": _secret(lambda m: f"{device.end - 1:#x}\n"),
        "page_offset": _secret(lambda m: "0x0\n"),
        "power": directory(POWER),
        "start": _secret(lambda m: f"{device.start:#x}\n"),
        "uevent": Entry(
            0o644,
            lambda m: "",
            # A mapping is on no bus; nobody hears of it.
            lambda m, t: synthetic_uevent(m, path, "", t, heard=False),
        ),
    }.get(match[2])


def _char(m: Machine, match: re.Match[str]) -> Entry | None:
    if not loaded(m):
        return None
    if match[1] is None:
        return directory(f"{DAX_MAJOR}:{d.region}" for d in m.dax_devices.values())
    device = _device(m, match[1])
    return None if device is None else link(f"../..{device.devpath}")


def _hmem_driver(m: Machine, match: re.Match[str]) -> Entry | None:
    if not loaded(m):
        return None
    if match[1] is None:
        return directory(["module", *_regions(m)])
    if match[1] == "module":
        return link("../../../../module/dax_hmem")
    return link(f"../../../../devices/platform/{match[1]}") if match[1] in _regions(m) else None


def _platform_device(m: Machine, match: re.Match[str]) -> Entry | None:
    return link(f"../../../devices/platform/{match[1]}") if match[1] in _regions(m) else None


def loaded(m: Machine) -> bool:
    """Whether udev has loaded the drivers, as it does for a device."""
    return bool(m.dax_devices)


def _modules(m: Machine) -> dict[str, str]:
    return _MODULES if loaded(m) else {}


def _module(m: Machine, match: re.Match[str]) -> Entry | None:
    name, sub, last = match.groups()
    driver = _modules(m).get(name)
    if driver is None:
        return None
    if sub is None:
        return directory(("drivers", "initstate"))
    if sub == "initstate" and last is None:
        return readonly(lambda m: "live\n")
    if sub != "drivers":
        return None
    if last is None:
        return directory((driver,))
    bus, _, what = driver.partition(":")
    return link(f"../../../bus/{bus}/drivers/{what}") if last == driver else None


_HMEM = rf"{PLATFORM}/hmem\.{NUMBER}"
_DAX = rf"{_HMEM}/dax\1\.0"


def _whole(path: str, *names: str) -> tuple[str, Callable[[Machine, re.Match[str]], Entry | None]]:
    """A directory that is there with the devices only."""
    return path, lambda m, _: directory(names or _regions(m)) if loaded(m) else None


ENTRIES = (
    _whole(PLATFORM),
    _whole("/sys/bus/platform", "devices", "drivers"),
    _whole("/sys/bus/platform/drivers", "hmem"),
    _whole("/sys/bus/platform/devices"),
    _whole("/sys/dev", "char"),
    (rf"{_HMEM}(?:/(\w+))?", _hmem_file),
    (rf"{_HMEM}/dax_region(?:/(\w+))?", _region_file),
    (rf"{_DAX}(?:/(\w+))?", _device_file),
    (rf"{_DAX}/mapping0/(\w+)", _mapping_file),
    (rf"({PLATFORM}/hmem\.[0-9]+(?:/dax[0-9]+\.0(?:/mapping0)?)?)/power/(\w+)", power_file),
    (rf"{BUS}/devices", _names),
    (rf"{BUS}/devices/([\w.]+)", _bus_device),
    (rf"{BUS}/drivers/(\w+)(?:/([\w.]+))?", _driver),
    (r"/sys/bus/platform/devices/([\w.]+)", _platform_device),
    (r"/sys/bus/platform/drivers/hmem(?:/([\w.]+))?", _hmem_driver),
    (rf"/sys/dev/char(?:/{DAX_MAJOR}:{NUMBER})?", _char),
    (rf"{BUS}/drivers", lambda m, _: directory(m.dax_drivers if loaded(m) else ())),
    (r"/sys/module", lambda m, _: directory(["memory_hotplug", *_modules(m)])),
    (r"/sys/module/(\w+)(?:/(\w+)(?:/([\w:]+))?)?", _module),
)

DIRECTORIES: dict[str, tuple[str, ...]] = {BUS: ("devices", "drivers")}
