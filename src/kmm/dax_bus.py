"""Special-purpose memory as devices of the dax bus, and their drivers (drivers/dax/bus.c).

Firmware's Soft Reserved ranges are devices hmem.N (drivers/dax/hmem), each with one dax device
over all of it; dividing a range among several is left out.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmm.dax_kmem import dev_dax_kmem_probe, dev_dax_kmem_remove
from kmm.errors import KernelError, kernel_error
from kmm.resource import Resource, __request_region, insert_resource, release_resource

if TYPE_CHECKING:
    from kmm.machine import Machine

SOFT_RESERVED = "Soft Reserved"
DAX_MAJOR = 252  # the first of those that are given out
INT_MAX = (1 << 31) - 1


@dataclass(slots=True, eq=False)
class DevDax:
    """A dax device: bytes from start to end, its node, and what its driver holds."""

    region: int
    start: int
    end: int  # behind the last byte
    target_node: int
    numa_node: int  # the nearest that was online when the device was made
    driver: str | None = None
    res: Resource | None = None
    mgid: int = -1

    @property
    def name(self) -> str:
        """Its name on the bus."""
        return f"dax{self.region}.0"

    @property
    def devpath(self) -> str:
        """Its path below /sys."""
        return f"/devices/platform/hmem.{self.region}/{self.name}"


@dataclass(slots=True, eq=False)
class DaxDriver:
    """A driver of the bus, and the names of the devices that it was told to take."""

    name: str
    probe: Callable[[Machine, DevDax], None]
    remove: Callable[[Machine, DevDax], None]
    match_always: bool = False
    ids: set[str] = field(default_factory=set)

    def matches(self, dev_dax: DevDax) -> bool:
        """Whether the driver takes a device (dax_bus_match)."""
        return self.match_always or dev_dax.name in self.ids


def dev_dax_probe(m: Machine, dev_dax: DevDax) -> None:
    """Reserve a device's range for programs that map it (drivers/dax/device.c).

    :raises Busy: if something is in it.
    """
    size = dev_dax.end - dev_dax.start
    try:
        dev_dax.res = __request_region(m.iomem_resource, dev_dax.start, size, dev_dax.name, 0)
    except KernelError as e:
        m.printk(
            f"device_dax {dev_dax.name}: mapping0: {dev_dax.start:#x}-{dev_dax.end - 1:#x} "
            "could not reserve range"
        )
        raise kernel_error(-errno.EBUSY, e.why) from None


def dev_dax_remove(m: Machine, dev_dax: DevDax) -> None:
    """Give a device's range back."""
    if dev_dax.res is not None:
        release_resource(dev_dax.res)
        dev_dax.res = None


def dax_drivers() -> dict[str, DaxDriver]:
    """The drivers of the bus: the one that takes every device, and kmem, which is told which."""
    return {
        "device_dax": DaxDriver("device_dax", dev_dax_probe, dev_dax_remove, True),
        "kmem": DaxDriver("kmem", dev_dax_kmem_probe, dev_dax_kmem_remove),
    }


def hmem_init(m: Machine, ranges: list[tuple[int, int, int]]) -> None:
    """Make a device of each Soft Reserved range, and give it to the first driver that takes it.

    :param ranges: (start, end, node) of each, bytes, in address order.
    """
    for region, (start, end, nid) in enumerate(ranges):
        near = min(sorted(m.n_online), key=lambda n: m.node_distance(nid, n))
        dev_dax = DevDax(region, start, end, nid, nid if nid in m.n_online else near)
        insert_resource(m.iomem_resource.root, Resource(start, end - 1, f"hmem.{region}"))
        m.dax_devices[dev_dax.name] = dev_dax
        # Whoever listens to uevents is not there yet.
        dev_dax_probe(m, dev_dax)
        dev_dax.driver = "device_dax"


def really_probe(m: Machine, driver: DaxDriver, dev_dax: DevDax) -> None:
    """Bind a device to a driver (drivers/base/dd.c).

    :raises Busy: if it has one; KernelError: what the driver fails with.
    """
    if dev_dax.driver is not None:
        raise kernel_error(-errno.EBUSY, f"{dev_dax.name} has the driver {dev_dax.driver}")
    try:
        driver.probe(m, dev_dax)
    except KernelError as e:
        m.printk(f"{driver.name}: probe of {dev_dax.name} failed with error -{e.errno}")
        raise
    dev_dax.driver = driver.name
    m.uevent("bind", dev_dax.devpath, "dax")


def _named(m: Machine, text: str) -> DevDax | None:
    return m.dax_devices.get(text.removesuffix("\n"))


def bind_store(m: Machine, driver: DaxDriver, text: str) -> None:
    """Bind the device that a user names to a driver (drivers/base/bus.c).

    :raises NoSuchDevice: if there is none or the driver does not take it; otherwise as
        really_probe.
    """
    dev_dax = _named(m, text)
    if dev_dax is None or not driver.matches(dev_dax):
        raise kernel_error(-errno.ENODEV, f"{driver.name} takes no device {text.rstrip()!r}")
    really_probe(m, driver, dev_dax)


def unbind_store(m: Machine, driver: DaxDriver, text: str) -> None:
    """Take the device that a user names away from its driver.

    :raises NoSuchDevice: if there is none or the driver does not have it.
    """
    dev_dax = _named(m, text)
    if dev_dax is None or dev_dax.driver != driver.name:
        raise kernel_error(-errno.ENODEV, f"{driver.name} has no device {text.rstrip()!r}")
    driver.remove(m, dev_dax)
    dev_dax.driver = None
    m.uevent("unbind", dev_dax.devpath, "dax")


def _device_id(text: str) -> str:
    """Return the device name that a user wrote, which need not exist (do_id_store).

    :raises InvalidArgument: for what is no device's name.
    """
    match = re.fullmatch(r"dax(0|-?[1-9][0-9]{0,9})\.(0|-?[1-9][0-9]{0,9})\n?", text, re.ASCII)
    if not match or not all(-INT_MAX - 1 <= int(n) <= INT_MAX for n in match.groups()):
        raise kernel_error(-errno.EINVAL, f"{text.rstrip()!r}; allowed: a name like dax0.0")
    return text.removesuffix("\n")


def new_id_store(m: Machine, driver: DaxDriver, text: str) -> None:
    """Tell a driver to take a device; one that has no driver is bound at once.

    :raises InvalidArgument: for what is no device's name.
    """
    driver.ids.add(_device_id(text))
    for dev_dax in m.dax_devices.values():
        if dev_dax.driver is None and driver.matches(dev_dax):
            try:
                really_probe(m, driver, dev_dax)
            except KernelError as e:
                # Whoever offers devices to a driver is not told which it refused.
                m.note_swallowed("driver_attach", e)


def remove_id_store(m: Machine, driver: DaxDriver, text: str) -> None:
    """Make a driver forget a device's name; one that it has stays.

    :raises InvalidArgument: for what is no device's name.
    """
    driver.ids.discard(_device_id(text))
