"""Workloads: what the programs and the kernel of a scenario do to memory, step by step.

A step names users by an id, which may stand for several of them.  Whatever is random comes of the
machine's seed and the step's, so that a scenario plays the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kmm import _workload
from kmm.balloon_compaction import Balloon, balloon_of
from kmm.cpuset import CpuSet, update_nodemask
from kmm.errors import KernelError, OutOfMemory, kernel_error
from kmm.hugetlbfs import HugetlbUser
from kmm.memory import KIND_NAMES, User, seed_of
from kmm.mempolicy import DEFAULT_POLICY, MemPolicy, mask_of, new_policy, touch_interleaved
from kmm.params import PAGE_SHIFT, PG_DIRTY, PG_REFERENCED, USER_SLAB_RECLAIMABLE
from kmm.wording import counted
from kmm.workload_hugetlb import new_user, pool_of, set_pool, touch_huge

if TYPE_CHECKING:
    from kmm.gup import Pin
    from kmm.machine import Machine

#: The steps that are played here.
OPS = tuple(
    (
        "user balloon grow shrink touch churn fwrite fread truncate pin unpin close cpuset hugetlb"
    ).split(),
)
#: Those that a balloon can do.
OF_BALLOONS = ("grow", "shrink", "close")
#: How many slots of a churn are drawn together, however many it is about.
_CHURNED_AT_ONCE = 1 << 20


class Workload:
    """The users that the steps of one scenario have made, by their ids.

    :param m: the machine they live on.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.groups: dict[str, list[User]] = {}
        self.pins: dict[str, list[Pin]] = {}

    def play(self, step: Mapping[str, Any]) -> str:
        """Play one checked step of OPS; returns what came of it, in words.

        :raises KernelError: naming what the machine does not take, or ENOMEM where this host has
            no memory for it; what was done before stays.
        """
        try:
            return self._play(step)
        except MemoryError:
            lacks = "this host has not enough memory for so many"
            what = f"{step['op']} {step.get('id', '')!r}"
            raise kernel_error(-12, f"{what}: {lacks}") from None

    def _play(self, step: Mapping[str, Any]) -> str:
        if step["op"] == "cpuset":
            return self._cpuset(step)
        if step["op"] == "hugetlb":
            return set_pool(self.m, step, self._nodes(step))
        if step["op"] == "user":
            return self._user(step)
        if step["op"] == "balloon":
            return self._balloon(step)
        if step["id"] not in self.groups:
            return "nothing to do: its user was refused, or is closed"
        if step["op"] not in OF_BALLOONS:
            for user in self.groups[step["id"]]:
                if balloon_of(self.m, user) is not None:
                    allowed = ", ".join(OF_BALLOONS)
                    raise kernel_error(-22, f"op: {step['op']!r}; allowed of a balloon: {allowed}")
        act: Callable[[User, Mapping[str, Any]], str] = getattr(self, f"_{step['op']}")
        return "; ".join(act(user, step) for user in list(self.groups[step["id"]]))

    # -- making -------------------------------------------------------------------------

    def _nodes(self, step: Mapping[str, Any]) -> list[int]:
        return [self.m.pxm_to_node.get(pxm, pxm) for pxm in step.get("nodes", [])]

    def _policy(self, step: Mapping[str, Any]) -> MemPolicy:
        nodes = self._nodes(step)
        mode = step.get("policy", "bind" if nodes else "default")
        cpuset = self._cpuset_of(step)
        mems = None if cpuset is None else cpuset.effective_mems
        return DEFAULT_POLICY if mode == "default" else new_policy(self.m, mode, nodes, mems=mems)

    def _cpuset_of(self, step: Mapping[str, Any]) -> CpuSet | None:
        if "cpuset" not in step:
            return None
        if step["cpuset"] not in self.m.cpusets:
            allowed = ", ".join(map(repr, self.m.cpusets)) or "none is there"
            raise kernel_error(-22, f"cpuset: {step['cpuset']!r}; allowed: {allowed}")
        return self.m.cpusets[step["cpuset"]]

    def _user(self, step: Mapping[str, Any]) -> str:
        """Make users, which have no page yet."""
        m, count = self.m, step.get("count", 1)
        names = [step["id"]] if count == 1 else [f"{step['id']}.{i}" for i in range(1, count + 1)]
        if step["id"] in self.groups or any(name in m.users for name in names):
            raise kernel_error(-22, f"id: {step['id']!r}; allowed: one that is not in use")
        policy, cpuset = self._policy(step), self._cpuset_of(step)
        huge = step.get("kind") == "hugetlb"
        order = pool_of(m, step).order if huge else step.get("order", 0)
        pages = amount_of(m, step, policy) >> order
        users: list[User] = []
        try:
            for name in names:
                make = new_user if huge else _new_user
                users.append(make(m, name, step, pages, policy))
        except KernelError:
            # Those made before it have nothing but reservations.
            for user in users:
                user.close()
            raise
        for user in users:
            if user.engine.tokens:
                user.engine.sow(seed_of(user.name))
            user.engine.locked = step.get("lock", False)
            if cpuset is not None:
                cpuset.attach(user)
        self.groups[step["id"]] = users
        unit = f"huge page of {4 << order} kB" if huge else _unit(order)
        kind = KIND_NAMES[users[0].kind]
        return f"{count} of kind {kind}, up to {counted(pages, unit)} each"

    def _balloon(self, step: Mapping[str, Any]) -> str:
        """Make a driver that can take pages away, and has none yet."""
        m, name = self.m, step["id"]
        if name in self.groups:
            raise kernel_error(-22, f"id: {name!r}; allowed: one that is not in use")
        balloon = Balloon(
            m,
            name,
            amount_of(m, step, DEFAULT_POLICY),
            movable=step.get("movable", True),
            unmanaged=step.get("unmanaged", True),
        )
        self.groups[name] = [balloon.user]
        return f"a balloon of up to {counted(balloon.user.pages, 'page')}"

    def _cpuset(self, step: Mapping[str, Any]) -> str:
        m, nodes = self.m, self._nodes(step)
        if step["id"] in m.cpusets:
            cs = m.cpusets[step["id"]]
            update_nodemask(cs, nodes)
        else:
            parent = m.cpusets.get(step.get("parent", ""))
            if "parent" in step and parent is None:
                allowed = ", ".join(map(repr, m.cpusets)) or "none is there"
                raise kernel_error(-22, f"parent: {step['parent']!r}; allowed: {allowed}")
            cs = CpuSet(m, step["id"], nodes, parent)
        return f"nodes {', '.join(map(str, sorted(cs.effective_mems)))}"

    # -- changing -----------------------------------------------------------------------

    def _grow(self, user: User, step: Mapping[str, Any]) -> str:
        coming, short = _Coming(user), ""
        balloon = balloon_of(self.m, user)
        # What is on the swap device is not missing at the end.
        last = user.nr_present - 1 if balloon is not None else user.last_slot()
        want = min(_blocks(self.m, step, user), user.pages - 1 - last)
        try:
            if balloon is not None:
                balloon.inflate(want)
            elif isinstance(user, HugetlbUser):
                _, short = touch_huge(user, range(last + 1, last + 1 + want))
            else:
                user.grow(want)
        except OutOfMemory as e:
            short = f": {e}"
        return f"{user.name}: {coming.came} of {want} came{coming.went()}{short}"

    def _shrink(self, user: User, step: Mapping[str, Any]) -> str:
        n, balloon = _blocks(self.m, step, user), balloon_of(self.m, user)
        have = user.nr_present
        freed = user.shrink(n) if balloon is None else balloon.deflate(min(n, have))
        return _what_went(user, freed)

    def _touch(self, user: User, step: Mapping[str, Any]) -> str:
        """Touch slots at random, each once."""
        n = min(_blocks(self.m, step, user), user.pages)
        slots = self._random(step, user).choice(user.pages, n, replace=False, shuffle=True)
        coming = _Coming(user)
        if isinstance(user, HugetlbUser):
            done, short = touch_huge(user, slots.tolist())
        else:
            done, short = touch(user, slots.astype(np.int64))
        said = f"{user.name}: {done} of {n} touched, {coming.came} of them came"
        return said + coming.went() + short

    def _churn(self, user: User, step: Mapping[str, Any]) -> str:
        """Free and allocate blocks of a cache at random, so many in all."""
        if user.kind < USER_SLAB_RECLAIMABLE or isinstance(user, HugetlbUser):
            raise kernel_error(-22, f"id: {user.name!r}; allowed: users of the kernel's kinds")
        n = _blocks(self.m, step, user) if user.pages else 0
        random, where = self._random(step, user), user.placement(0)
        done, came, went = 0, 0, 0
        while done < n:
            some = min(n - done, _CHURNED_AT_ONCE)
            slots = random.integers(0, user.pages, some, dtype=np.int64)
            counts = _workload.churn_slots(
                user.engine, self.m, slots, user.gfp, where.nid, mask_of(where), user.cpu
            )
            done, came, went = done + counts[0], came + counts[1], went + counts[2]
            if counts[0] < some:
                break
        self.m.run_kswapds()
        self.m.give_back_records()
        return f"{user.name}: {done} of {n} turned over, {came} came, {went} went"

    def _fwrite(self, user: User, step: Mapping[str, Any]) -> str:
        return self._file(user, step, PG_DIRTY)

    def _fread(self, user: User, step: Mapping[str, Any]) -> str:
        return self._file(user, step, PG_REFERENCED)

    def _file(self, user: User, step: Mapping[str, Any], flags: int) -> str:
        start = min(step.get("first", 0), user.pages)
        n = min(_blocks(self.m, step, user), user.pages - start)
        coming, short = _Coming(user), ""
        try:
            user.fault(start, n, flags)
        except OutOfMemory as e:
            short = f": {e}"
        return f"{user.name}: {coming.came} of {counted(n, 'page')} came{coming.went()}{short}"

    def _truncate(self, user: User, step: Mapping[str, Any]) -> str:
        start = min(step.get("first", 0), user.pages)
        freed = user.release(start, user.pages - start)
        return _what_went(user, freed)

    def _pin(self, user: User, step: Mapping[str, Any]) -> str:
        """Hold pages that are in memory in place."""
        at = step.get("first", 0)
        end = min(at + step.get("pages", 1), user.pages)
        held, before = self.pins.setdefault(user.name, []), at
        while at < end:
            pin = self.m.pin(user, at, step.get("long", True))
            held.append(pin)
            at = pin.index + pin.nr_pages
        return f"{user.name}: {counted(max(0, end - before), 'page')} held"

    def _unpin(self, user: User, step: Mapping[str, Any]) -> str:
        pins = self.pins.pop(user.name, [])
        for pin in pins:
            self.m.unpin(pin)
        return f"{user.name}: {counted(len(pins), 'hold')} let go"

    def _close(self, user: User, step: Mapping[str, Any]) -> str:
        freed = user.nr_present << user.engine.order
        self._unpin(user, step)
        balloon = balloon_of(self.m, user)
        if balloon is not None:
            balloon.close()
        else:
            user.close()
        self.groups.pop(step["id"], None)
        return f"{user.name}: {counted(freed, 'page')} went"

    def _random(self, step: Mapping[str, Any], user: User) -> np.random.Generator:
        """What is random in a step, for each user another."""
        words = [self.m.config.seed, step.get("seed", 0), *user.name.encode()]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def _what_went(user: User, freed: int) -> str:
    left = user.nr_present
    is_left = "is left" if left == 1 else "are left"
    return f"{user.name}: {counted(freed, 'page')} went, {left} {is_left}"


def _new_user(
    m: Machine, name: str, step: Mapping[str, Any], pages: int, policy: MemPolicy
) -> User:
    """Make a user that has no page yet."""
    return User(
        m,
        name,
        step.get("kind", "anon"),
        pages,
        policy=policy,
        cpu=step.get("cpu"),
        order=step.get("order", 0),
        thp=step.get("thp", "never"),
        tokens=step.get("tokens", False),
    )


def touch(user: User, slots: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[int, str]:
    """Touch slots of a user in an order; those that are absent get a page, as far as there is one.

    :param slots: their numbers, int64.
    :return: how many were touched, and why the rest was not: nothing if all were.
    """
    m, at = user.m, 0
    interleaved = user.policy.mode == "interleave"
    while at < len(slots):
        done = 0
        if interleaved and not user.killed:
            done = touch_interleaved(user, slots[at:])
        elif not user.killed:
            where = user.placement(int(slots[at]))
            done = _workload.touch_slots(
                user.engine, m, slots[at:], user.gfp, where.nid, mask_of(where), user.cpu
            )
        m.run_kswapds()
        at += done
        if done == 0:
            # The next one has to be waited for; who was killed learns of it here.
            try:
                user.fault(int(slots[at]), 1)
            except OutOfMemory as e:
                return at, f": {e}"
            at += 1
    return at, ""


class _Coming:
    """Counts the pages of a user that come while others of its own may go."""

    def __init__(self, user: User) -> None:
        self.user, self.present, self.came_before = user, user.nr_present, user.engine.nr_came

    @property
    def came(self) -> int:
        return self.user.engine.nr_came - self.came_before

    def went(self) -> str:
        """What memory lost of it meanwhile, in words; nothing where nothing went."""
        lost = self.present + self.came - self.user.nr_present
        if not lost:
            return ""
        if self.user.killed:
            return f"; {lost} went, as it was killed"
        swapped = self.user.engine.nr_swapped
        return f"; {lost} went" + (f", {swapped} are on the swap device" if swapped else "")


def amount_of(m: Machine, step: Mapping[str, Any], policy: MemPolicy) -> int:
    """Return how many pages a step is about.

    :param policy: a share is one of its nodes' memory, or of the whole machine's.
    """
    if "pages" in step:
        return int(step["pages"])
    if "size" in step:
        return int(step["size"] >> PAGE_SHIFT)
    nodes: Iterable[int] = policy.nodes or sorted(m.nodes)
    managed = sum(z.managed_pages for nid in nodes for z in m.nodes[nid].zones)
    return int(managed * step["share"])


def _blocks(m: Machine, step: Mapping[str, Any], user: User) -> int:
    """How many of a user's slots a step is about: all, if it does not say."""
    if not {"pages", "size", "share"} & step.keys():
        return user.pages
    return amount_of(m, step, user.policy) >> user.engine.order


def _unit(order: int) -> str:
    return "page" if order == 0 else f"block of order {order}"
