"""The fragmenter: brings a zone's free memory into a wished-for shape, as long use would.

It plans first, down to each free block, and so knows whether a target can be reached before it
changes anything.  Then it takes free memory for users of its own, anonymous spaces, files and a
slab cache, and lets pages go again where free blocks are to be.  Everything stays known, and
movable where it should be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kmm import _fragment
from kmm.arguments import check_kind, check_zone
from kmm.errors import check_number, kernel_error, shown
from kmm.memory import User
from kmm.mmzone import Zone
from kmm.params import (
    MAX_ORDER,
    MIGRATE_RECLAIMABLE,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    PG_DIRTY,
    ZONE_MOVABLE,
)
from kmm.wording import counted

if TYPE_CHECKING:
    from kmm.machine import Machine

Pfns = npt.NDArray[np.uint64]

EINVAL, ENOSPC = 22, 28
_RUNS = (64, 4096)  # pages that one user gets in a row, fewest and most


@dataclass(frozen=True, slots=True)
class FragmentTarget:
    """What a zone is to look like; shares are from 0 to 1.

    :param free: free pages, of the zone's managed ones.
    :param large: of the free memory, what is in blocks of order 9 and up; or
    :param orders: what of it is in blocks of each order, 0 to 10, which makes 1 in sum.
    :param unmovable: of the zone's pageblocks, those that hold an unmovable page; None leaves
        them as they are.
    :param file: of the pages that are taken, what files get; anonymous spaces get the rest.
    :param tolerance: how far a share that is measured may lie off.
    """

    free: float
    large: float | None = None
    orders: Sequence[float] | None = None
    unmovable: float | None = None
    file: float = 0.5
    tolerance: float = 0.02


@dataclass(frozen=True, slots=True)
class FragmentState:
    """What zones look like: the shares of a FragmentTarget, measured, and their pages.

    ``users`` are the names of those that the fragmenter has made.
    """

    free: float
    large: float
    orders: tuple[float, ...]
    unmovable: float
    free_pages: int
    managed_pages: int
    users: tuple[str, ...] = ()


@dataclass(slots=True)
class _Plan:
    zone: Zone
    split: Pfns  # blocks of order 10 of which one half is taken
    heads: Pfns  # free blocks that are taken
    pages: int  # in them
    counts: list[int]  # free blocks of each order in the end
    held: int  # pageblocks with an unmovable page in the end, and all there are
    pageblocks: int
    holes: list[tuple[int, Pfns]] = field(default_factory=list)  # order, where each begins
    unmovable: Pfns = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    pages = [n << order for order, n in enumerate(counts)]
    free = sum(pages)
    return tuple(n / free if free else 0.0 for n in pages)


def measure(m: Machine, where: Zone | int, users: Sequence[str] = ()) -> FragmentState:
    """Measure a zone, or all populated zones of a node together.

    :param where: a zone, or a node's number; users: names to note in the result.
    :raises InvalidArgument: for a node without memory, or a zone of another machine.
    """
    zones = _zones(m, where)
    counts = [sum(z.nr_free()[order] for z in zones) for order in range(MAX_ORDER)]
    blocks = [_fragment.unmovable_pageblocks(m, z) for z in zones]
    free = sum(n << order for order, n in enumerate(counts))
    managed = sum(z.managed_pages for z in zones)
    shares = _shares(counts)
    return FragmentState(
        free / managed,
        sum(shares[PAGEBLOCK_ORDER:]),
        shares,
        sum(n for n, _ in blocks) / sum(n for _, n in blocks),
        free,
        managed,
        tuple(users),
    )


def _zones(m: Machine, where: Zone | int) -> list[Zone]:
    if isinstance(where, Zone):
        check_zone(m, where)
        zones = [where]
    else:
        zones = m.nodes[check_number("where", where, 0, len(m.nodes) - 1)].zones
    zones = [z for z in zones if z.populated and z.managed_pages]
    if not zones:
        raise kernel_error(-EINVAL, f"where: {where!r}; allowed: a zone or a node with memory")
    return zones


# -- what is asked for ----------------------------------------------------------------------


def _check_share(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # type: ignore[operator]
        raise kernel_error(-EINVAL, f"{name}: {shown(value)}; allowed: a share from 0 to 1")


def check_target(target: FragmentTarget) -> tuple[float, ...]:
    """Check a target; returns the share of each order that it comes to.

    :raises InvalidArgument: naming the field, its value and what is allowed.
    """
    check_kind("target", target, FragmentTarget)
    for name in ("free", "file", "tolerance"):
        _check_share(name, getattr(target, name))
    if target.unmovable is not None:
        _check_share("unmovable", target.unmovable)
    if (target.large is None) == (target.orders is None):
        raise kernel_error(
            -EINVAL, f"large: {target.large!r}, orders: {target.orders!r}; allowed: one of them"
        )
    if target.large is not None:
        _check_share("large", target.large)
        small = (1 - target.large) / PAGEBLOCK_ORDER
        return (*[small] * PAGEBLOCK_ORDER, 0.0, float(target.large))
    if not isinstance(target.orders, Sequence | np.ndarray) or isinstance(target.orders, str):
        allowed = f"a list of {MAX_ORDER} shares"
        raise kernel_error(-EINVAL, f"orders: {shown(target.orders)}; allowed: {allowed}")
    orders = tuple(target.orders)
    for value in orders:
        _check_share("orders", value)
    if len(orders) != MAX_ORDER or abs(sum(orders) - 1) > 1e-6:
        raise kernel_error(
            -EINVAL, f"orders: {orders}; allowed: {MAX_ORDER} shares that make 1 in sum"
        )
    return tuple(float(v) for v in orders)


def _refuse(zone: Zone, why: str) -> Exception:
    return kernel_error(-ENOSPC, f"node {zone.nid} zone {zone.name}: {why}")


def _blocks_wanted(pages: int, shares: Sequence[float]) -> list[int]:
    """How many blocks of each order make so many free pages; what does not divide goes down."""
    counts, over = [0] * MAX_ORDER, 0.0
    for order in reversed(range(MAX_ORDER)):
        want = pages * shares[order] + over
        counts[order] = max(0, round(want / (1 << order)))
        over = want - (counts[order] << order)
    return counts


# -- planning -------------------------------------------------------------------------------


def _free_heads(zone: Zone, order: int) -> Pfns:
    lists = [zone.free_list(order, mt) for mt in range(MIGRATE_RECLAIMABLE + 1)]
    return np.array(sorted(pfn for part in lists for pfn in part), dtype=np.uint64)


def _plan(
    m: Machine,
    zone: Zone,
    target: FragmentTarget,
    shares: Sequence[float],
    rng: np.random.Generator,
) -> _Plan:
    """Decide about every block; raises if the target is out of reach."""
    pages = round(target.free * zone.managed_pages)
    counts = _blocks_wanted(pages, shares)
    wanted, held, pageblocks = _unmovable_wanted(m, zone, target)
    there = sum(n << o for o, n in enumerate(zone.nr_free()))
    if pages > there:
        raise _refuse(
            zone, f"free {target.free}: {counted(pages, 'page')} wanted, but only {there} free now"
        )
    plan, blocks = _plan_large(zone, counts, rng)
    plan.held, plan.pageblocks = held + wanted, pageblocks
    pool = _plan_holes(zone, plan, blocks, counts, rng)
    _plan_unmovable(plan, pool, wanted, rng)
    return plan


def _plan_large(zone: Zone, counts: list[int], rng: np.random.Generator) -> tuple[_Plan, Pfns]:
    """Choose the large blocks that stay; the plan, and the pageblocks that are taken."""
    tens, nines = (rng.permutation(_free_heads(zone, o)) for o in (10, 9))
    n10, n9 = counts[10], counts[9]
    if n10 > len(tens):
        raise _refuse(zone, f"{n10} free blocks of order 10 are wanted, there are {len(tens)}")
    split_n = max(0, n9 - len(nines))
    if split_n > len(tens) - n10:
        raise _refuse(
            zone,
            f"{n9} free blocks of order 9 beside {n10} of order 10 are wanted; there are "
            f"{len(nines)} and {len(tens)}",
        )
    split = tens[n10 : n10 + split_n]
    whole = tens[n10 + split_n :]
    half = np.uint64(PAGEBLOCK_NR_PAGES)
    cut = split + half * rng.integers(0, 2, len(split), dtype=np.uint64)
    gone = nines[min(n9, len(nines)) :]
    blocks = np.concatenate([gone, cut, whole, whole + half])
    small = [_free_heads(zone, o) for o in range(PAGEBLOCK_ORDER)]
    loose = sum(len(h) << o for o, h in enumerate(small))
    plan = _Plan(
        zone,
        split,
        np.concatenate([gone, cut, whole, *small]),
        len(blocks) * PAGEBLOCK_NR_PAGES + loose,
        counts,
        0,
        0,
    )
    return plan, blocks


def _plan_holes(
    zone: Zone, plan: _Plan, blocks: Pfns, counts: list[int], rng: np.random.Generator
) -> list[Pfns]:
    """Place the blocks below order 9, none of which may merge with another.

    A region of an order always keeps a page in use.  A free block takes one half of a region of
    the next order; the other half is a region again.

    :return: the regions that are left over, by order.
    """
    pool = [np.zeros(0, dtype=np.uint64) for _ in range(PAGEBLOCK_ORDER + 1)]
    pool[PAGEBLOCK_ORDER] = rng.permutation(blocks)
    for order in reversed(range(PAGEBLOCK_ORDER)):
        need = counts[order]
        _split_regions(pool, order + 1, need)
        if len(pool[order + 1]) < need:
            raise _refuse(
                zone,
                f"{need} free blocks of order {order} are wanted, which must not merge; with the "
                f"larger ones in place there is room for {len(pool[order + 1])}: fewer free pages "
                "or larger blocks would fit",
            )
        if not need:
            continue
        regions = rng.permutation(pool[order + 1])
        pool[order + 1] = regions[need:]
        size = np.uint64(1 << order)
        side = rng.integers(0, 2, need, dtype=np.uint64)
        plan.holes.append((order, regions[:need] + side * size))
        kept = regions[:need] + (np.uint64(1) - side) * size
        pool[order] = np.concatenate([pool[order], kept])
    return pool


def _split_regions(pool: list[Pfns], order: int, need: int) -> None:
    """Halve larger regions until there are enough of an order, the smallest first."""
    while len(pool[order]) < need:
        larger = next((k for k in range(order + 1, len(pool)) if len(pool[k])), None)
        if larger is None:
            return
        missing = need - len(pool[order])
        n = min(len(pool[larger]), -(-missing // (1 << (larger - order))))
        part, pool[larger] = pool[larger][:n], pool[larger][n:]
        half = np.uint64(1 << (larger - 1))
        pool[larger - 1] = np.concatenate([pool[larger - 1], part, part + half])


def _unmovable_wanted(m: Machine, zone: Zone, target: FragmentTarget) -> tuple[int, int, int]:
    """How many pageblocks are to get an unmovable page, have one, and are there at all."""
    held, total = _fragment.unmovable_pageblocks(m, zone)
    if target.unmovable is None:
        return 0, held, total
    wanted = round(target.unmovable * total)
    if wanted < held:
        raise _refuse(
            zone,
            f"unmovable {target.unmovable}: {held} of {total} pageblocks hold an unmovable page "
            "already, which cannot be moved out",
        )
    if zone.zone_idx == ZONE_MOVABLE and wanted:
        raise _refuse(
            zone, f"unmovable {target.unmovable}: the kernel puts no unmovable page there"
        )
    return wanted - held, held, total


def _plan_unmovable(plan: _Plan, pool: list[Pfns], more: int, rng: np.random.Generator) -> None:
    """Choose a page in use in each of so many pageblocks that are taken apart."""
    kept = rng.permutation(np.concatenate(pool))
    _, first = np.unique(kept >> np.uint64(PAGEBLOCK_ORDER), return_index=True)
    if more > len(first):
        raise _refuse(
            plan.zone,
            f"unmovable: {more} more pageblocks of {plan.pageblocks} are wanted, of those that "
            f"are taken apart there are {len(first)}",
        )
    plan.unmovable = kept[np.sort(rng.permutation(first)[:more])]


def _check_plans(plans: list[_Plan], target: FragmentTarget, shares: Sequence[float]) -> None:
    """Compare what the plans come to with what is wanted.

    :raises KernelError: ENOSPC, naming the first share that lies off by more than is tolerated.
    """
    counts = [sum(plan.counts[o] for plan in plans) for o in range(MAX_ORDER)]
    free = sum(n << order for order, n in enumerate(counts))
    pairs = [("free", target.free, free / sum(plan.zone.managed_pages for plan in plans))]
    pairs += [
        (f"orders[{o}]", want, have)
        for o, (want, have) in enumerate(zip(shares, _shares(counts), strict=True))
    ]
    if target.unmovable is not None:
        have = sum(plan.held for plan in plans) / sum(plan.pageblocks for plan in plans)
        pairs.append(("unmovable", target.unmovable, have))
    for name, want, have in pairs:
        if abs(want - have) > target.tolerance:
            raise kernel_error(
                -ENOSPC,
                f"{name}: {want:.4f} is wanted, {have:.4f} is the nearest: it does not "
                "divide into blocks of that size",
            )


# -- doing it -------------------------------------------------------------------------------


class _Takers:
    """The users that get a zone's memory: slots in a row, pages of each user in runs."""

    def __init__(self, m: Machine, plan: _Plan, target: FragmentTarget, seed: int) -> None:
        self.m, self.plan = m, plan
        where = f"fragment {seed} node {plan.zone.nid} {plan.zone.name}"
        kinds = ("anon", "file", "slab")
        n = next(
            i for i in itertools.count() if not any(f"{where} {i} {k}" in m.users for k in kinds)
        )
        self.names = [f"{where} {n} {kind}" for kind in kinds]
        self.file_share = target.file

    def take(self, rng: np.random.Generator) -> None:
        """Take the planned blocks and hand their pages to an anonymous space and a file."""
        m, plan = self.m, self.plan
        _fragment.split_free(m, plan.zone, plan.split)
        pfns = np.zeros(plan.pages, dtype=np.uint64)
        _fragment.take_free(m, plan.zone, plan.heads, pfns)
        pfns.sort()
        few, most = _RUNS
        lengths = rng.integers(few, most + 1, 2 * plan.pages // few + 2)
        runs = int(np.searchsorted(np.cumsum(lengths), plan.pages)) + 1
        of_file = np.repeat(rng.random(runs) < self.file_share, lengths[:runs])[: plan.pages]
        parts = (pfns[~of_file], pfns[of_file])
        #: Of each user, the pfn of every slot.
        self.pfns = parts
        self.users = [
            User(m, name, kind, len(part))
            for name, kind, part in zip(self.names, ("anon", "file"), parts, strict=False)
        ]
        for user, part, flags in zip(self.users, parts, (PG_DIRTY, 0), strict=True):
            _fragment.attach_many(m, user.engine, 0, part, flags)

    def _slots(self, pfns: Pfns) -> list[npt.NDArray[np.int64]]:
        """The slots of some pages, for each user, in the pages' order."""
        out = []
        for have in self.pfns:
            at = np.searchsorted(have, pfns)
            found = at < len(have)
            found[found] = have[at[found]] == pfns[found]
            out.append(at[found].astype(np.int64))
        return out

    def pollute(self) -> None:
        """Give the chosen pages to a slab cache."""
        chosen = self.plan.unmovable
        if not len(chosen):
            return
        cache = User(self.m, self.names[2], "slab", len(chosen))
        self.users.append(cache)
        start = 0
        for user, slots in zip(self.users, self._slots(chosen), strict=False):
            _fragment.hand_over(self.m, user.engine, slots, cache.engine, start)
            start += len(slots)

    def let_go(self, rng: np.random.Generator) -> None:
        """Free the planned blocks, in no order of their places."""
        m, plan = self.m, self.plan
        for order, starts in plan.holes:
            pages = rng.permutation(starts)[:, None] + np.arange(1 << order, dtype=np.uint64)
            for user, slots in zip(self.users, self._slots(pages.reshape(-1)), strict=False):
                _fragment.release_slots(m, user.engine, slots, m.this_cpu)
        plan.zone.drain()


def fragment(m: Machine, where: Zone | int, target: FragmentTarget, seed: int = 0) -> FragmentState:
    """Bring a zone, or each populated zone of a node, to a target.

    :param where: a zone, or a node's number; seed: the same one on the same machine gives the
        same machine again, bit for bit.
    :return: what was reached, as measured, and the names of the users that have the memory.
    :raises InvalidArgument: for a target that says nothing sensible, or another argument that is
        not what it has to be.
    :raises KernelError: ENOSPC, with the reason, for one that cannot be reached; nothing is
        changed then, but that the zones' per-CPU lists are empty.
    """
    shares = check_target(target)
    check_number("seed", seed, 0, (1 << 63) - 1)
    zones = _zones(m, where)
    for zone in zones:
        zone.drain()
    rng = np.random.default_rng(seed)
    plans = [_plan(m, zone, target, shares, rng) for zone in zones]
    _check_plans(plans, target, shares)
    names: list[str] = []
    for plan in plans:
        takers = _Takers(m, plan, target, seed)
        takers.take(rng)
        takers.pollute()
        takers.let_go(rng)
        names += [user.name for user in takers.users]
    m.give_back_records()
    return measure(m, where, names)
