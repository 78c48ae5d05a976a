"""Loads: what the programs of a scenario or a recording do to memory, as a step's ``load`` says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kmm.errors import KernelError, OutOfMemory, check_number, kernel_error
from kmm.hugetlb import ULONG_MAX
from kmm.hugetlbfs import HugetlbUser, find_hstate
from kmm.memory import User, seed_of
from kmm.mempolicy import DEFAULT_POLICY, MemPolicy, new_policy
from kmm.params import (
    NR_PAGES_MAX,
    PAGE_SHIFT,
    USER_ANON,
    USER_SHMEM,
    USER_SLAB_UNRECLAIMABLE,
)
from kmm.sysfs_hugetlb import nr_hugepages_store
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

#: Pages that are freed together when address ranges go away (struct mmu_gather).
MMU_GATHER_BUNDLE, MAX_GATHER_BATCH, MAX_GATHER_BATCH_COUNT = 8, 510, 19
#: What a process unmaps before the memory that it was started for: its program's own pages.
PROGRAM_PAGES = 76
#: The inode number of the first file of a tmpfs mount, whose root is number 1.
FIRST_INO = 2


def play_loads(m: Machine, load: Any) -> str:
    """Do what a step's ``load`` says: one object, or a list of them, in order.

    A program that the kernel refuses something has done the rest, as a shell line goes on.

    :param load: as schema.check_load returns it.
    :return: what came of it, in words.
    """
    said = []
    for one in load if isinstance(load, list) else [load]:
        try:
            said.append(_play(m, one))
        except KernelError as e:
            said.append(f"{load_name(one)}: {e}")
    return "; ".join(said)


def timeline(step: Mapping[str, Any]) -> list[float | Mapping[str, Any]]:
    """Return what a shell line does in its order: its loads, and the seconds that it sleeps.

    :param step: a checked sh step; a load is looked for by the name of its program or file.
    """
    parts = re.split(r"[;&\n]+", step.get("line", ""))
    out: list[float | Mapping[str, Any]] = []
    at = 0
    for load in step.get("load", ()):
        name = re.escape(load_name(load))
        word = re.compile(rf"(?:^|[\s/]){name}(?:[\s)]|$)")
        found = next((i for i in range(at, len(parts)) if word.search(parts[i])), at - 1)
        out += _sleeps(parts[at : found + 1])
        at = found + 1
        out.append(load)
    return out + _sleeps(parts[at:])


def _sleeps(parts: list[str]) -> list[float | Mapping[str, Any]]:
    matches = (re.match(r"\s*sleep ([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*$", part) for part in parts)
    return [float(match[1]) for match in matches if match]


def load_name(load: Mapping[str, Any]) -> str:
    """Return what the user of a load's pages is called."""
    return str(load.get("user") or load.get("file") or load["kind"])


def load_pages(load: Mapping[str, Any]) -> int:
    """Return how many pages a load is about."""
    if "pages" in load:
        return int(load["pages"])
    return int((load["size"] * load.get("count", 1)) >> PAGE_SHIFT)


def _policy(m: Machine, load: Mapping[str, Any]) -> MemPolicy:
    nodes = list(load.get("nodes", []))  # the kernel's numbers, as its shell has them
    mode = load.get("policy", "bind" if nodes else "default")
    # The kernel's own pages heed no binding to nodes that have only movable memory.
    if load["kind"] == "slab" and "policy" not in load and nodes:
        mode, nodes = "preferred", nodes[:1]
    return DEFAULT_POLICY if mode == "default" else new_policy(m, mode, nodes)


def _play(m: Machine, load: Mapping[str, Any]) -> str:
    if load.get("free"):
        return _free(m, load)
    if load["kind"] == "hugetlb":
        return _hugetlb_pool(m, load)
    if load["kind"] == "hugetlb_user":
        return _touch_huge_pages(m, load)
    return _touch(m, load)


def _hugetlb_pool(m: Machine, load: Mapping[str, Any]) -> str:
    """Set the size of a pool, or of its part on some nodes."""
    h = find_hstate(m, load.get("size", m.default_hstate.size))
    count = check_number("load.count", load.get("count"), 0, ULONG_MAX)
    nodes = [m.pxm_to_node.get(pxm, pxm) for pxm in load.get("nodes", [])]
    for nid in nodes or [None]:
        nr_hugepages_store(m, h, count, nid)
    return f"{h.name}: {counted(h.nr_huge_pages, 'page')}"


def _touch_huge_pages(m: Machine, load: Mapping[str, Any]) -> str:
    """Let a program map huge pages and touch some, first to last."""
    name = str(load.get("user", "hugetlb"))
    count = check_number("load.count", load.get("count"), 0, NR_PAGES_MAX)
    touch = check_number("load.touch", load.get("touch", count), 0, count)
    user = m.users.get(name)
    if user is not None and not isinstance(user, HugetlbUser):
        raise kernel_error(-22, f"user: {name!r}; allowed: a new one, or one of huge pages")
    try:
        if user is None:
            size, policy = load.get("size"), _policy(m, load)
            user = HugetlbUser(m, name, count, size=size, policy=policy, tokens=True)
            if load.get("tokens"):
                user.engine.sow(seed_of(name))
        user.fault(0, touch)
    except KernelError as e:
        return f"{name}: {e}"
    return f"{name}: {user.nr_present} of {counted(user.pages, 'huge page')}"


def _free(m: Machine, load: Mapping[str, Any]) -> str:
    """Let a program end, or a file be deleted."""
    name = load_name(load)
    user = m.users.get(name)
    if user is None:
        return f"{name}: not there"
    freed, start = user.nr_present, 0
    if user.kind == USER_ANON:
        for n in mmu_gather_batches(user.pages, PROGRAM_PAGES):
            user.release(start, n)
            start += n
    user.close()
    return f"{name}: {counted(freed, 'page')} freed"


def mmu_gather_batches(pages: int, before: int = 0) -> Iterator[int]:
    """Yield how many pages a process that ends lets go at a time (tlb_batch_pages_flush).

    :param pages: to let go; before: pages that were unmapped before them.
    """
    done = -before
    while done < pages:
        for batch in (MMU_GATHER_BUNDLE, *[MAX_GATHER_BATCH] * MAX_GATHER_BATCH_COUNT):
            start, done = max(done, 0), done + batch
            if start < min(done, pages):
                yield min(done, pages) - start


def _touch(m: Machine, load: Mapping[str, Any]) -> str:
    """Let a program write so many pages, first to last."""
    name, pages = load_name(load), load_pages(load)
    user = m.users.get(name)
    if isinstance(user, HugetlbUser):
        raise kernel_error(-22, f"user: {name!r}, of huge pages; allowed: a new one, or no such")
    if user is None:
        thp = "madvise" if load.get("thp") else "never"
        user = User(m, name, load["kind"], pages, policy=_policy(m, load), tokens=True, thp=thp)
        if user.kind == USER_SHMEM:
            # What takes turns begins with another node in each file of a mount.
            files = sum(u.kind == USER_SHMEM for u in m.users.values())
            user.interleave_offset = FIRST_INO + files - 1
        start = 0
    else:
        start = user.pages
        user.engine.resize(start + pages)
    user.engine.locked = bool(load.get("lock"))
    try:
        user.fault(start, pages)
        short = ""
    except OutOfMemory as e:
        short = f" of {user.pages}: {e}"
    what = "slab" if user.kind == USER_SLAB_UNRECLAIMABLE else "page"
    return f"{name}: {counted(user.nr_present, what)}{short}"
