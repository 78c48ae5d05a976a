"""The fragmenter reaches what it is asked for, or says why it cannot."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kmm import KernelError, Machine
from kmm.fragment import FragmentTarget, fragment, measure
from kmm.memory import User
from kmm.mempolicy import new_policy
from kmm.mmzone import Zone
from kmm.params import USER_ANON, USER_FILE, USER_SLAB_UNRECLAIMABLE
from kmm.snapshot import differences, dump
from tests.conftest import DIMM, two_nodes

SIZE = 512 << 20


def machine(kind: str = "online_kernel") -> Machine:
    m = two_nodes(f"memhp_default_state={kind}")
    m.plug("a", 1, DIMM, SIZE)
    return m


def zone_of(m: Machine) -> Zone:
    return next(z for z in m.nodes[1].zones if z.populated)


def buddies_apart(zone: Zone) -> bool:
    """Whether no two free buddies below order 10 stand side by side."""
    for order in range(10):
        heads = {pfn for mt in range(3) for pfn in zone.free_list(order, mt)}
        if any(pfn ^ 1 << order in heads for pfn in heads):
            return False
    return True


@pytest.mark.parametrize("seed", [0, 1, 2, 77])
@pytest.mark.parametrize(
    ("free", "large", "unmovable"), [(0.3, 0.0, 0.5), (0.4, 0.25, 0.2), (0.6, 0.7, 0.05)]
)
def test_share_of_large_blocks_and_unmovable_pageblocks(
    seed: int, free: float, large: float, unmovable: float
) -> None:
    m = machine()
    zone = zone_of(m)
    target = FragmentTarget(free, large=large, unmovable=unmovable)
    reached = fragment(m, zone, target, seed)
    assert reached == measure(m, zone, reached.users)
    assert abs(reached.free - free) < 0.01
    assert abs(reached.large - large) < 0.02
    assert abs(reached.unmovable - unmovable) < 0.01
    # Measured once more, from what the kernel's own files show.
    row = m.read("/proc/buddyinfo").splitlines()[-1].split()
    counts = [int(n) for n in row[4:]]
    pages = sum(n << o for o, n in enumerate(counts))
    assert pages == reached.free_pages
    assert sum(n << o for o, n in enumerate(counts) if o >= 9) / pages == pytest.approx(
        reached.large
    )
    index = m.read("/sys/kernel/debug/extfrag/unusable_index").splitlines()[-1].split()
    assert float(index[4 + 9]) == pytest.approx(1 - reached.large, abs=0.001)
    assert buddies_apart(zone)
    m.validate()


@pytest.mark.parametrize("seed", [3, 4])
def test_the_shape_of_buddyinfo(seed: int) -> None:
    m = machine("online_movable")
    shape = (0.3, 0.2, 0.1, 0.05, 0.05, 0.02, 0.02, 0.02, 0.04, 0.1, 0.1)
    reached = fragment(m, 1, FragmentTarget(0.35, orders=shape), seed)
    assert reached.orders == pytest.approx(shape, abs=0.015)
    m.validate()


def test_the_same_seed_gives_the_same_machine_and_another_one_another() -> None:
    target = FragmentTarget(0.4, large=0.2, unmovable=0.3)
    dumps = []
    for seed in (5, 5, 6):
        m = machine()
        fragment(m, zone_of(m), target, seed)
        users = {u.kind: u.engine.slots.tobytes() for u in m.users.values()}
        dumps.append((dump(m), users))
    assert not list(differences(dumps[0][0], dumps[1][0]))
    assert dumps[0][1] == dumps[1][1]
    assert list(differences(dumps[0][0], dumps[2][0]))


def test_everything_is_known_and_movable_where_it_should_be() -> None:
    m = machine()
    zone = zone_of(m)
    reached = fragment(m, zone, FragmentTarget(0.4, large=0.1, unmovable=0.3, file=0.25), 9)
    kinds = {m.users[name].kind: m.users[name] for name in reached.users}
    assert set(kinds) == {USER_ANON, USER_FILE, USER_SLAB_UNRECLAIMABLE}
    held = {k: u.nr_present for k, u in kinds.items()}
    assert sum(held.values()) + reached.free_pages == reached.managed_pages
    share = held[USER_FILE] / (held[USER_FILE] + held[USER_ANON])
    assert share == pytest.approx(0.25, abs=0.05)
    slabs = kinds[USER_SLAB_UNRECLAIMABLE].pfns()
    assert len(np.unique(slabs >> 9)) == len(slabs) == round(0.3 * SIZE / (2 << 20))
    before = reached.large
    m.write("/sys/devices/system/node/node1/compact", "1")
    assert measure(m, zone).large > before
    m.validate()
    for name in reached.users:
        m.users[name].close()
    zone.drain()
    assert measure(m, zone).free == 1
    assert measure(m, zone).unmovable == 0
    m.validate()


def test_a_movable_zone_goes_offline_after_all() -> None:
    m = machine("online_movable")
    fragment(m, 1, FragmentTarget(0.5, large=0.1), 1)
    m.write("/sys/devices/system/memory/memory32/state", "offline")
    m.validate()


def test_what_others_have_stays_and_a_second_time_goes_further() -> None:
    m = machine()
    zone = zone_of(m)
    other = User(m, "other", "anon", 3000, policy=new_policy(m, "bind", [1]), tokens=True)
    other.grow(3000)
    other.write_tokens(0, np.arange(3000))
    fragment(m, zone, FragmentTarget(0.6, large=0.5), 1)
    reached = fragment(m, zone, FragmentTarget(0.2, large=0.5, unmovable=0.1), 1)
    assert (reached.free, reached.large) == pytest.approx((0.2, 0.5), abs=0.02)
    assert len(m.users) == 6  # the slab cache came with the second
    assert (other.read_tokens(0, 3000) == np.arange(3000)).all()
    m.validate()


NOT_ZERO = (1.0, *[0.0] * 10)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (FragmentTarget(0.99, orders=NOT_ZERO), "must not merge; with the larger ones in place"),
        (FragmentTarget(0.98, large=0.0), "must not merge"),
        (FragmentTarget(0.5, orders=(*[0.0] * 9, 1.0, 0.0)), None),
        (FragmentTarget(0.9, orders=(*[0.0] * 9, 1.0, 0.0)), "of order 9 beside 0 of order 10"),
        (FragmentTarget(0.9, large=0.9, unmovable=1), "more pageblocks of 256 are wanted"),
        (FragmentTarget(0.001, large=1, tolerance=0.01), "does not divide"),
    ],
)
def test_what_cannot_be_reached_is_refused_and_says_why(
    target: FragmentTarget, why: str | None
) -> None:
    m = machine()
    if why is None:
        assert fragment(m, zone_of(m), target).large == 1
        m.validate()
        return
    before = dump(m)
    with pytest.raises(KernelError, match=why) as e:
        fragment(m, zone_of(m), target)
    assert e.value.errno == errno.ENOSPC
    assert not list(differences(before, dump(m)))
    m.validate()


def test_refusals_that_depend_on_what_is_there() -> None:
    m = machine("online_movable")
    before = dump(m)
    with pytest.raises(KernelError, match="the kernel puts no unmovable page there"):
        fragment(m, 1, FragmentTarget(0.5, large=0.2, unmovable=0.1))
    assert not list(differences(before, dump(m)))
    fragment(m, 1, FragmentTarget(0.5, large=0.2))
    with pytest.raises(KernelError, match="pages wanted, but only"):
        fragment(m, 1, FragmentTarget(0.6, large=0.2))
    with pytest.raises(KernelError, match="of order 10 are wanted, there are"):
        fragment(m, 1, FragmentTarget(0.5, large=1))
    kernel = machine()
    fragment(kernel, 1, FragmentTarget(0.5, large=0.2, unmovable=0.4))
    with pytest.raises(KernelError, match="hold an unmovable page already"):
        fragment(kernel, 1, FragmentTarget(0.4, large=0.2, unmovable=0.3))
    m.validate()
    kernel.validate()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (FragmentTarget(1.5, large=0.1), "free: 1.5; allowed: a share from 0 to 1"),
        (FragmentTarget(0.5, large=-0.1), "large: -0.1; allowed"),
        (FragmentTarget(0.5), "large: None, orders: None; allowed: one of them"),
        (FragmentTarget(0.5, large=0.1, orders=NOT_ZERO), "allowed: one of them"),
        (FragmentTarget(0.5, orders=(0.5, 0.5)), "allowed: 11 shares that make 1"),
        (FragmentTarget(0.5, orders=(0.5, *[0.0] * 10)), "allowed: 11 shares that make 1"),
        (FragmentTarget(0.5, large=0.1, unmovable="x"), "unmovable: 'x'; allowed"),  # type: ignore[arg-type]
    ],
)
def test_targets_that_make_no_sense(target: FragmentTarget, message: str) -> None:
    m = machine()
    with pytest.raises(KernelError, match=message) as e:
        fragment(m, 1, target)
    assert e.value.errno == errno.EINVAL
    with pytest.raises(KernelError, match="seed: -1; allowed"):
        fragment(m, 1, FragmentTarget(0.5, large=0.5), -1)
    with pytest.raises(KernelError, match="where: 7; allowed"):
        measure(m, 7)
    m.unplug("a")
    with pytest.raises(KernelError, match="where: 1; allowed: a zone or a node with memory"):
        measure(m, 1)
    m.validate()


def test_arguments_of_a_wrong_kind_are_refused() -> None:
    m = machine()
    before = dump(m)
    good = FragmentTarget(free=0.5, large=0.5)
    shares = [0.0] * 10 + [1.0]
    for where, target, message in (
        ("1", good, "where: '1'"),
        (None, good, "where: None"),
        (zone_of(machine()), good, "zone: of another machine"),
        (1, {"free": 0.5}, "target: .*; allowed: a FragmentTarget"),
        (1, None, "target: None; allowed: a FragmentTarget"),
        (1, FragmentTarget(free="a", large=0.5), "free: 'a'; allowed: a share"),  # type: ignore[arg-type]
        (1, FragmentTarget(free=True, large=0.5), "free: True; allowed: a share"),
        (1, FragmentTarget(free=0.5, orders=5), "orders: 5; allowed: a list"),  # type: ignore[arg-type]
        (1, FragmentTarget(free=0.5, orders=[*shares[:10], "1"]), "orders: '1'"),  # type: ignore[list-item]
    ):
        with pytest.raises(KernelError, match=message) as e:
            fragment(m, where, target)  # type: ignore[arg-type]
        assert e.value.errno == errno.EINVAL
    assert not differences(before, dump(m))
    m.validate()
