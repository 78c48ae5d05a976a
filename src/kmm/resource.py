"""The tree of physical address ranges and its text, /proc/iomem (kernel/resource.c)."""

from __future__ import annotations

import errno
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kmm.errors import ConfigError, ValidationError, bug, kernel_error, shown
from kmm.params import PAGE_SHIFT, PAGE_SIZE, MiB

IORESOURCE_MEM = 0x200
IORESOURCE_SYSRAM = 0x01000000
IORESOURCE_SYSRAM_DRIVER_MANAGED = 0x02000000
IORESOURCE_SYSRAM_MERGEABLE = 0x04000000
IORESOURCE_EXCLUSIVE = 0x08000000
IORESOURCE_BUSY = 0x80000000
IORESOURCE_TYPE_BITS = 0x1F00
IORESOURCE_EXT_TYPE_BITS = IORESOURCE_SYSRAM
IORESOURCE_SYSTEM_RAM = IORESOURCE_MEM | IORESOURCE_SYSRAM

MAX_IORES_LEVEL = 5


@dataclass(slots=True, eq=False)
class Resource:
    """A range of physical addresses, end inclusive (struct resource)."""

    start: int
    end: int
    name: str
    flags: int = IORESOURCE_MEM
    desc: int = 0
    # The links stay out of the repr, which would print the whole tree from any node.
    parent: Resource | None = field(default=None, repr=False)
    children: list[Resource] = field(default_factory=list, repr=False)

    def contains(self, start: int, end: int) -> bool:
        """Whether the range from start to end (inclusive) lies inside."""
        return self.start <= start and end <= self.end

    def overlaps(self, start: int, end: int) -> bool:
        """Whether the range from start to end (inclusive) touches this one."""
        return self.start <= end and start <= self.end


class ResourceTree:
    """A resource tree; its root covers all addresses (iomem_resource)."""

    def __init__(self) -> None:
        self.root = Resource(0, (1 << 64) - 1, "PCI mem")

    def walk(self) -> Iterator[tuple[int, Resource]]:
        """Yield (depth, resource) in address order, parents first, without the root."""
        stack = [(0, child) for child in reversed(self.root.children)]
        while stack:
            depth, res = stack.pop()
            yield depth, res
            stack.extend((depth + 1, child) for child in reversed(res.children))


def _position(parent: Resource, start: int) -> int:
    return bisect_left(parent.children, start, key=lambda r: r.start)


def _conflict(parent: Resource, start: int, end: int) -> Resource | None:
    """Return the first child that a range touches, or the parent if it sticks out of it."""
    if start > end or not parent.contains(start, end):
        return parent
    i = _position(parent, start)
    for child in parent.children[max(0, i - 1) : i + 1]:
        if child.overlaps(start, end):
            return child
    return None


def _link(parent: Resource, new: Resource) -> None:
    new.parent = parent
    parent.children.insert(_position(parent, new.start), new)


def _index(parent: Resource, res: Resource) -> int:
    i = _position(parent, res.start)
    if i == len(parent.children) or parent.children[i] is not res:
        bug("release_resource", f"{res.name} {res.start:#x} is not under {parent.name}")
    return i


def request_resource(parent: Resource, new: Resource) -> None:
    """Put a resource under a parent.

    :raises Busy: if it touches a child or sticks out.
    """
    if _conflict(parent, new.start, new.end) is not None:
        raise kernel_error(errno.EBUSY, f"{new.name} {new.start:#x}-{new.end:#x} conflicts")
    _link(parent, new)


def insert_resource(parent: Resource, new: Resource) -> None:
    """Put a resource where it fits: inside what contains it, around what it contains.

    :raises Busy: if it overlaps a resource partly.
    """
    while True:
        found = _conflict(parent, new.start, new.end)
        if found is None:
            _link(parent, new)
            return
        if found is parent:
            raise kernel_error(errno.EBUSY, f"{new.name} sticks out of {parent.name}")
        same = (found.start, found.end) == (new.start, new.end)
        if not found.contains(new.start, new.end) or same:
            break
        parent = found
    low, high = _index(parent, found), _position(parent, new.end + 1)
    inside = parent.children[low:high]
    if not new.contains(inside[0].start, inside[-1].end):
        raise kernel_error(errno.EBUSY, f"{new.name} {new.start:#x}-{new.end:#x} overlaps partly")
    for child in inside:
        child.parent = new
    new.children = inside
    new.parent = parent
    parent.children[low:high] = [new]


def __request_region(
    tree: ResourceTree, start: int, size: int, name: str, flags: int, desc: int = 0
) -> Resource:
    """Reserve a range of bytes, descending into parents that are not busy.

    The new resource is busy, and of its parent's type and desc.

    :param start: the first byte.
    :param size: bytes.
    :raises AlreadyExists: for whatever reason the range cannot be had.
    """
    end = start + size - 1
    parent = tree.root
    new = Resource(start, end, name, flags, desc)
    while True:
        found = _conflict(parent, start, end)
        if found is None:
            inherited = parent.flags & (IORESOURCE_TYPE_BITS | IORESOURCE_EXT_TYPE_BITS)
            new.flags = inherited | IORESOURCE_BUSY | flags
            new.desc = parent.desc
            _link(parent, new)
            return new
        if found is parent or found.flags & IORESOURCE_BUSY:
            raise kernel_error(
                errno.EEXIST,
                f"{start:#x}-{end:#x} overlaps {found.name} {found.start:#x}-{found.end:#x}",
            )
        parent = found


def release_resource(res: Resource) -> None:
    """Take a resource, with what is under it, out of its tree."""
    if res.parent is not None:
        del res.parent.children[_index(res.parent, res)]
        res.parent = None


def release_mem_region_adjustable(tree: ResourceTree, start: int, size: int) -> bool:
    """Remove a range of bytes from the busy resource that holds it: delete, trim or split.

    Does nothing if no busy resource holds the whole range, nor if a child would stick out of
    what remains: 6.1 takes children as immutable (__adjust_resource), warns and goes on.

    :param start: the first byte.
    :param size: bytes.
    :return: whether the range was removed.
    """
    end = start + size - 1
    parent = tree.root
    while True:
        i = _position(parent, start)
        near = parent.children[max(0, i - 1) : i + 1]
        res = next((c for c in near if c.contains(start, end)), None)
        if res is None:
            return False
        if not res.flags & IORESOURCE_BUSY:
            parent = res
            continue
        break
    if not res.flags & IORESOURCE_MEM:
        return False
    if (res.start, res.end) == (start, end):
        release_resource(res)
        return True
    # After a cut in the middle the lower part is the old resource, the upper part a new one.
    low, high = (end + 1, res.end) if res.start == start else (res.start, start - 1)
    if res.children and not (low <= res.children[0].start and res.children[-1].end <= high):
        return False
    upper = None
    if res.start < start and end < res.end:
        upper = Resource(end + 1, res.end, res.name, res.flags, res.desc)
    res.start, res.end = low, high
    if upper is not None:
        _link(parent, upper)
    return True


def _mergeable(a: Resource, b: Resource) -> bool:
    return (
        a.flags == b.flags
        and a.end + 1 == b.start
        and a.name == b.name
        and a.desc == b.desc
        and not a.children
        and not b.children
    )


def merge_system_ram_resource(tree: ResourceTree, res: Resource) -> None:
    """Mark a System RAM resource mergeable, and merge it with the neighbours that are alike."""
    parent = res.parent
    wanted = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY
    if parent is None or res.flags & wanted != wanted:
        return
    res.flags |= IORESOURCE_SYSRAM_MERGEABLE
    i = _index(parent, res)
    if i + 1 < len(parent.children) and _mergeable(res, parent.children[i + 1]):
        res.end = parent.children.pop(i + 1).end
    if i and _mergeable(parent.children[i - 1], res):
        parent.children[i - 1].end = res.end
        parent.children.pop(i)
        res.parent = None


def walk_system_ram_range(
    tree: ResourceTree, start_pfn: int, nr_pages: int
) -> list[tuple[int, int]]:
    """Return (pfn, pages) of the parts of a pfn range that are busy System RAM, whole pages."""
    out: list[tuple[int, int]] = []
    first, last = start_pfn << PAGE_SHIFT, ((start_pfn + nr_pages) << PAGE_SHIFT) - 1
    wanted = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY
    stack = [tree.root]
    while stack:
        parent = stack.pop()
        i = max(0, _position(parent, first) - 1)
        for res in parent.children[i:]:
            if res.start > last:
                break
            if not res.overlaps(first, last):
                continue
            if res.flags & wanted == wanted:
                pfn = -(-max(res.start, first) // PAGE_SIZE)
                end = (min(res.end, last) + 1) // PAGE_SIZE
                if end > pfn:
                    out.append((pfn, end - pfn))
            else:
                stack.append(res)
    return sorted(out)


def iomem_show(tree: ResourceTree) -> str:
    """Return the text of /proc/iomem: every resource; only the indent ends at a depth (r_show)."""
    return "".join(
        f"{'  ' * min(depth, MAX_IORES_LEVEL)}{res.start:08x}-{res.end:08x} : {res.name}\n"
        for depth, res in tree.walk()
    )


_BUSY = re.compile(
    r"Kernel (code|rodata|data|bss)|Crash kernel|ACPI Tables|ACPI Non-volatile Storage|"
    r"Unusable memory|PCI MMCONFIG.*|PCI ECAM.*|IOAPIC.*|Local APIC|.*ROM"
)


def flags_of_name(name: str, start: int) -> int:
    """Return the flags that the kernel gives a resource of this name at this address."""
    if name == "System RAM":
        return IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY
    if re.fullmatch(r"System RAM \(.*\)", name):
        return IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY | IORESOURCE_SYSRAM_DRIVER_MANAGED
    if name.startswith("Kernel ") or name == "Crash kernel":
        return IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY
    if name == "Reserved":
        return IORESOURCE_MEM | (IORESOURCE_BUSY if start < MiB else 0)
    return IORESOURCE_MEM | (IORESOURCE_BUSY if _BUSY.fullmatch(name) else 0)


def _misfit(parent: Resource, start: int, end: int) -> str | None:
    found = _conflict(parent, start, end)
    if start > end:
        return "ends before it starts"
    if found is parent:
        return f"is not inside {parent.name[:60]}"
    return f"overlaps {found.name[:60]}" if found else None


def parse_iomem(text: str) -> ResourceTree:
    """Build the tree of a /proc/iomem text.

    :raises ConfigError: naming the line that is not understood or does not fit.
    """
    tree = ResourceTree()
    stack = [tree.root]
    rows = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows and all(re.match(r"\s*0+-0+ : ", line) for _, line in rows):
        raise ConfigError("/proc/iomem: all addresses are zero: it was read without privilege")
    for number, line in rows:
        match = re.fullmatch(r"((?:  )*)([0-9a-f]+)-([0-9a-f]+) : (.*)", line)
        depth = len(match[1]) // 2 if match else 0
        if not match or depth >= len(stack) or depth > MAX_IORES_LEVEL:
            raise ConfigError(
                f"/proc/iomem: line {number}: {shown(line)}; allowed: 'start-end : name'"
            )
        start, end = int(match[2], 16), int(match[3], 16)
        if depth == MAX_IORES_LEVEL:
            # The indent goes no further: a line inside an earlier one is that one's child.
            while depth + 1 < len(stack) and stack[depth + 1].contains(start, end):
                depth += 1
        del stack[depth + 1 :]
        res = Resource(start, end, match[4].rstrip(), flags_of_name(match[4].rstrip(), start))
        why = _misfit(stack[depth], start, end)
        if why:
            raise ConfigError(f"/proc/iomem: line {number}: {shown(line)} {why}")
        _link(stack[depth], res)
        stack.append(res)
    return tree


def dump(tree: ResourceTree) -> list[tuple[Any, ...]]:
    """Return the tree as plain tuples, for comparing two of them."""
    return [(depth, r.start, r.end, r.name, r.flags, r.desc) for depth, r in tree.walk()]


def check_tree(tree: ResourceTree) -> None:
    """Check order, nesting and links.

    :raises ValidationError: at the first resource that is out of place.
    """
    stack = [tree.root]
    while stack:
        parent = stack.pop()
        last = parent.start - 1
        for child in parent.children:
            where = f"resource {child.start:#x}-{child.end:#x} {child.name}"
            if child.parent is not parent:
                raise ValidationError(f"{where}: its parent is not the one that lists it")
            if child.start > child.end or not parent.contains(child.start, child.end):
                raise ValidationError(f"{where}: not inside {parent.name}")
            if child.start <= last:
                raise ValidationError(f"{where}: overlaps the one before it")
            last = child.end
            stack.append(child)
