"""Random steps for a stress test: who uses the memory, and what is done to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kmm.firmware import device_memory
from kmm.hugetlbfs import HugetlbUser
from kmm.params import PAGE_SHIFT, PMD_SIZE, USER_FILE, GiB, MachineConfig, MiB
from kmm.vmstat import node_items

if TYPE_CHECKING:
    from kmm.memory import User
    from kmm.scenario import Player

Step = dict[str, Any]

DIMMS = 16
_NODES = 4  # of which two have CPUs and memory at boot
_BLOCKS_OF_DIMM = 4
_UNITS = 64  # users that have together what is in use, if all were as large
_SYSTEM = "/sys/devices/system/"
_WITHOUT_SWAP = ("nr_inactive_file", "nr_active_file", "nr_slab_reclaimable")
_ONLINE = ("online_movable", "online_movable", "online_kernel", "online")

#: Sorts of users, and how many hundredths of what is in use each has.
SORTS: dict[str, tuple[int, Step]] = {
    "anon": (22, {}),
    "anon_thp": (14, {"thp": "always"}),
    "anon_madvise": (8, {"thp": "madvise"}),
    "anon_locked": (1, {"lock": True}),
    "shmem": (8, {"kind": "shmem"}),
    "shmem_thp": (2, {"kind": "shmem", "thp": "always"}),
    "dirty": (12, {"kind": "file"}),
    "clean": (12, {"kind": "file"}),
    "file_thp": (1, {"kind": "file", "thp": "always"}),
    "slab": (3, {"kind": "slab", "order": 3}),
    "slab_small": (1, {"kind": "slab"}),
    "reclaimable": (5, {"kind": "slab_reclaimable", "order": 2}),
    "stack": (1, {"kind": "stack", "order": 2}),
    "page_table": (1, {"kind": "page_table"}),
    "kernel": (2, {"kind": "kernel", "order": 5}),
    "driver": (1, {"kind": "driver_movable"}),
    "balloon": (2, {}),
    "hugetlb": (4, {}),
}


def machine_of(size: int, seed: int) -> Step:
    """Return the description of a machine: half of its memory at boot, half for DIMMs.

    :param size: bytes in all, a multiple of 4 GiB.
    """
    dimm = size // 2 // DIMMS
    block = max(128 * MiB, 1 << (min(dimm // _BLOCKS_OF_DIMM, 2 * GiB)).bit_length() - 1)
    return {
        "memory": size // 2,
        "maxmem": size,
        "slots": DIMMS,
        "cpus": 4,
        "nodes": [
            {"cpus": "0-1", "memory": size // 4},
            {"cpus": "2-3", "memory": size // 4},
            {},
            {},
        ],
        "srat": "full",
        "cmdline": "memhp_default_state=online_movable",
        "block_size": block,
        "swap": size // 32,
        "seed": seed,
    }


class Steps:
    """What happens next, at random, by a seed and what there is on the machine.

    :param used: bytes that are to be in use; seed: a number.
    """

    def __init__(self, player: Player, used: int, seed: int) -> None:
        self.player, self.m = player, player.m
        self.rng = random.Random(seed)
        self.used = used >> PAGE_SHIFT
        self.unit = max(self.used // _UNITS, 1024)
        self._made = 0
        self._held: list[str] = []
        self._pending: list[Step] = []
        self._acts: dict[Callable[[], Step], int] = {
            self._grow: 14,
            self._shrink: 10,
            self._touch: 7,
            self._churn: 8,
            self._file: 14,
            self._truncate: 4,
            self._pin: 3,
            self._unpin: 3,
            self._close: 2,
            self._user: 3,
            self._plug: 3,
            self._unplug: 2,
            self._online: 9,
            self._offline: 9,
            self._compact: 1,
            self._drop_caches: 1,
            self._hugepages: 3,
            self._alloc: 6,
            self._free: 5,
            self._tunable: 1,
            self._hog: 1,
            self._starve: 2,
        }

    # -- all there is at first ------------------------------------------------------------

    def fill(self) -> Iterator[Step]:
        """Yield the steps that plug all DIMMs in and bring the memory into use."""
        for number in range(DIMMS):
            yield {
                "op": "write",
                "path": _SYSTEM + "memory/auto_online_blocks",
                "value": _ONLINE[number % len(_ONLINE)],
            }
            yield self._dimm(number)
        pool = self.used * SORTS["hugetlb"][0] // 100 * 3 // 2 // 512
        yield self._pool(pool + 8)
        for sort, (share, _) in SORTS.items():
            left = self.used * share // 100
            while left > 0:
                pages = min(left, self.unit)
                left -= pages
                step = self._new(sort, pages)
                yield step
                if sort != "hugetlb":
                    yield self._fill_of(sort, step["id"], pages)

    def _fill_of(self, sort: str, name: str, pages: int) -> Step:
        op = {"dirty": "fwrite", "file_thp": "fwrite", "clean": "fread"}.get(sort, "grow")
        return {"op": op, "id": name, "pages": pages}

    def _new(self, sort: str, pages: int) -> Step:
        """Make a user that may have somewhat more than so many pages."""
        self._made += 1
        name, most = f"{sort}{self._made}", pages * 5 // 4
        if sort == "hugetlb":
            load = {"kind": "hugetlb_user", "user": name, "size": PMD_SIZE, "tokens": True}
            load["count"] = max(pages // 512, 1)
            return {"op": "sh", "line": f"hog {name}", "load": load}
        if sort == "balloon":
            return {"op": "balloon", "id": name, "pages": most}
        step = {"op": "user", "id": name, "pages": most, "tokens": True, **SORTS[sort][1]}
        step["pages"] = max(most, 1 << step.get("order", 0))
        step["cpu"] = self.rng.randrange(4)
        policy = self.rng.choices(("default", "bind", "preferred", "interleave"), (6, 1, 1, 2))[0]
        if policy != "default":
            some = self.rng.sample(range(_NODES), self.rng.randrange(1, _NODES))
            step |= {"policy": policy, "nodes": sorted(some)}
        return step

    def _dimm(self, number: int) -> Step:
        config: MachineConfig = self.m.config
        size = (config.maxmem - config.memory) // DIMMS
        block = self.m.block_pages << PAGE_SHIFT
        base = -(-device_memory(config)[0] // block) * block
        addr = base + number * size
        return {
            "op": "plug",
            "id": f"dimm{number}",
            "node": number % _NODES,
            "addr": addr,
            "size": size,
        }

    # -- what happens then ----------------------------------------------------------------

    def next(self) -> Step:
        """Return the next step."""
        for name, users in self.player.workload.groups.items():
            if users[0].killed:
                return {"op": "close", "id": name}
        while self._pending:
            step = self._pending.pop(0)
            # Who was killed is closed already.
            if step["id"] in self.player.workload.groups:
                return step
        acts, weights = list(self._acts), list(self._acts.values())
        return self.rng.choices(acts, weights)[0]()

    def _pages_in_use(self) -> int:
        return sum(u.nr_present << u.engine.order for u in self.m.users.values())

    def _some(self) -> int:
        """How many pages a step is about: often few, sometimes a quarter of a large user's."""
        return self.rng.randrange(1, max(self.unit >> self.rng.randrange(2, 10), 2))

    def _pick(self, good: Callable[[User], bool] = lambda _: True) -> str | None:
        names = [n for n, users in self.player.workload.groups.items() if good(users[0])]
        return self.rng.choice(names) if names else None

    def _of(self, op: str, good: Callable[[User], bool], **more: Any) -> Step:
        """A step about a user of a sort, or a new user if there is none."""
        name = self._pick(good)
        if name is None:
            return self._user()
        if "pages" in more:
            order = self.player.workload.groups[name][0].engine.order
            more["pages"] = max(more["pages"], 1 << order)
        return {"op": op, "id": name, **more}

    def _grow(self) -> Step:
        if self._pages_in_use() > self.used:
            return self._shrink()
        lack = self._pages_in_use() < self.used * 9 // 10
        pages = self.unit if lack else self._some()
        return self._of(
            "grow", lambda u: u.kind != USER_FILE and u.nr_present < u.pages, pages=pages
        )

    def _shrink(self) -> Step:
        if self._pages_in_use() < self.used * 9 // 10:
            return self._grow()
        return self._of("shrink", lambda u: u.nr_present > 0, pages=self._some())

    def _touch(self) -> Step:
        good = ("anon", "shmem")
        more = {"pages": self._some(), "seed": self.rng.getrandbits(32)}
        return self._of("touch", lambda u: u.name.startswith(good), **more)

    def _churn(self) -> Step:
        caches = ("slab", "reclaimable", "stack", "page_table", "kernel", "driver")
        more = {"pages": self._some(), "seed": self.rng.getrandbits(32)}
        return self._of("churn", lambda u: u.name.startswith(caches), **more)

    def _file(self) -> Step:
        op = self.rng.choice(("fwrite", "fread"))
        more = {"first": self.rng.randrange(self.unit), "pages": self._some()}
        return self._of(op, lambda u: u.kind == USER_FILE, **more)

    def _truncate(self) -> Step:
        if self._pages_in_use() < self.used * 9 // 10:
            return self._file()
        first = self.rng.randrange(self.unit)
        return self._of("truncate", lambda u: u.kind == USER_FILE, first=first)

    def _hog(self) -> Step:
        """Let a program want a little more than a node has; it goes after a few other steps."""
        free = {
            nid: sum(z.nr_free_pages for z in self.m.nodes[nid].zones)
            for nid in sorted(self.m.n_memory)
        }
        nid = min(free, key=lambda n: free[n])
        if free[nid] > self.used // 2:
            return self._grow()
        return self._want(nid, free[nid] * 11 // 10, self.rng.choice(("bind", "preferred")))

    def _starve(self) -> Step:
        """Let a program want more of a node than reclaim can find there: somebody is killed."""
        swap = self.m.swap
        spare = swap.pages - swap.device.nr_used if swap is not None else 0
        room = {nid: self._room(nid) + spare for nid in sorted(self.m.n_memory)}
        nid = min(room, key=lambda n: room[n])
        return self._want(nid, room[nid] * 11 // 10 + 4096, "bind", self.rng.random() < 0.5)

    def _room(self, nid: int) -> int:
        """Pages of a node that are free or can be had without the swap device."""
        items = node_items(self.m, self.m.nodes[nid])
        free = sum(z.nr_free_pages for z in self.m.nodes[nid].zones)
        return free + sum(items[name] for name in _WITHOUT_SWAP)

    def _want(self, nid: int, pages: int, policy: str, lock: bool = False) -> Step:
        """Let a program take so many pages of a node, and go after a few other steps."""
        self._made += 1
        name = f"anon_hog{self._made}"
        pxm = next(p for p, n in self.m.pxm_to_node.items() if n == nid)
        user = {"op": "user", "id": name, "pages": pages, "nodes": [pxm], "tokens": True}
        user["policy"] = policy
        if lock:
            user["lock"] = True
        few = {"pages": min(pages, 4096), "seed": self.rng.getrandbits(32)}
        self._pending = [
            {"op": "grow", "id": name},
            {"op": "touch", "id": name, **few},
            {"op": "close", "id": name},
        ]
        return user

    def _pin(self) -> Step:
        more = {"first": self.rng.randrange(self.unit), "pages": self.rng.randrange(1, 64)}
        more["long"] = self.rng.random() < 0.7
        return self._of("pin", lambda u: u.name.startswith(("anon", "shmem")), **more)

    def _unpin(self) -> Step:
        pins = self.player.workload.pins
        return self._of("unpin", lambda u: bool(pins.get(u.name)))

    def _close(self) -> Step:
        huge = [u.name for u in self.m.users.values() if isinstance(u, HugetlbUser)]
        if huge and self.rng.random() < 0.3:
            name = self.rng.choice(huge)
            load = {"kind": "hugetlb_user", "user": name, "free": True}
            return {"op": "sh", "line": f"kill {name}", "load": load}
        return self._of("close", lambda _: True)

    def _user(self) -> Step:
        sort = self.rng.choices(list(SORTS), [share for share, _ in SORTS.values()])[0]
        return self._new(sort, self.rng.randrange(512, self.unit))

    def _plug(self) -> Step:
        out = [n for n in range(DIMMS) if f"dimm{n}" not in self.m.dimms]
        return self._dimm(self.rng.choice(out)) if out else self._unplug()

    def _unplug(self) -> Step:
        if not self.m.dimms:
            return self._plug()
        return {"op": "unplug", "id": self.rng.choice(sorted(self.m.dimms))}

    def _write(self, path: str, value: object) -> Step:
        return {"op": "write", "path": path, "value": str(value)}

    def _block(self, state: str) -> int | None:
        """A block in a state, of a DIMM in most cases."""
        first = device_memory(self.m.config)[0] // (self.m.block_pages << PAGE_SHIFT)
        if self.rng.random() < 0.1:
            first = 0
        blocks = self.m.memory_blocks.values()
        ids = [b.block_id for b in blocks if b.state == state and b.block_id >= first]
        return self.rng.choice(ids) if ids else None

    def _online(self) -> Step:
        block = self._block("offline")
        if block is None:
            return self._offline()
        return self._write(f"{_SYSTEM}memory/memory{block}/state", self.rng.choice(_ONLINE))

    def _offline(self) -> Step:
        block = self._block("online")
        if block is None:
            return self._plug()
        return self._write(f"{_SYSTEM}memory/memory{block}/state", "offline")

    def _compact(self) -> Step:
        if self.rng.random() < 0.5:
            return self._write("/proc/sys/vm/compact_memory", 1)
        nid = self.rng.choice(sorted(self.m.n_online))
        return self._write(f"{_SYSTEM}node/node{nid}/compact", 1)

    def _drop_caches(self) -> Step:
        return self._write("/proc/sys/vm/drop_caches", self.rng.choice((1, 2, 3)))

    def _pool(self, pages: int) -> Step:
        return self._write("/proc/sys/vm/nr_hugepages", pages)

    def _hugepages(self) -> Step:
        pool = self.used * SORTS["hugetlb"][0] // 100 // 512 + 8
        return self._pool(self.rng.randrange(pool // 2, pool * 2))

    def _alloc(self) -> Step:
        self._made += 1
        name, order = f"held{self._made}", self.rng.randrange(11)
        self._held.append(name)
        words = ("GFP_KERNEL", "GFP_ATOMIC", "GFP_USER", "GFP_HIGHUSER_MOVABLE")
        return {
            "op": "alloc",
            "id": name,
            "count": max(self._some() >> 2 >> order, 1),
            "order": order,
            "gfp": self.rng.choice(words),
            "node": self.rng.randrange(_NODES),
        }

    def _free(self) -> Step:
        if not self._held:
            return self._alloc()
        return {"op": "free", "id": self._held.pop(self.rng.randrange(len(self._held)))}

    def _tunable(self) -> Step:
        name, values = self.rng.choice(
            (
                ("swappiness", (0, 60, 100)),
                ("watermark_scale_factor", (1, 10, 100)),
                ("watermark_boost_factor", (0, 15000)),
                ("percpu_pagelist_high_fraction", (0, 8)),
                ("dirty_ratio", (5, 20)),
            )
        )
        return self._write(f"/proc/sys/vm/{name}", self.rng.choice(values))
