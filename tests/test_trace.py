"""Every function that can fail is made to fail at its calls in every chain that reaches it.

Each chain runs once to count the calls; then, on a new machine each time, one call of one
function fails: the first, a middle one and the last.  The machine must be as before.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable

import pytest

from kmm import Machine
from kmm import memory_hotplug as mh
from kmm.acpi_memhotplug import acpi_memory_device_add
from kmm.contig_alloc import alloc_contig_pages
from kmm.errors import InvalidArgument, KernelError
from kmm.hugetlb_pool import demote
from kmm.hugetlbfs import HugetlbUser
from kmm.memory import User
from kmm.memory_group import memory_group_register_dynamic, memory_group_register_static
from kmm.mempolicy import new_policy
from kmm.snapshot import differences, dump
from kmm.trace import FALLIBLE
from tests.conftest import DIMM, two_nodes
from tests.settle import settled_differences

BLOCK = 128 << 20
STATE = "/sys/devices/system/memory/memory32/state"
BLOCKS = 5  # so that there is a first, a middle and a last section


def _empty(cmdline: str = "memhp_default_state=offline") -> Machine:
    return two_nodes(cmdline)


def _added(cmdline: str = "memhp_default_state=offline", blocks: int = 1) -> Machine:
    m = two_nodes(cmdline)
    flags = mh.MHP_MEMMAP_ON_MEMORY if "memmap" in cmdline else 0
    mh.add_memory(m, 1, DIMM, blocks * BLOCK, flags)
    return m


def _online(cmdline: str = "memhp_default_state=offline", blocks: int = 1) -> Machine:
    m = _added(cmdline, blocks)
    for i in range(32, 32 + blocks):
        m.write(STATE.replace("32", str(i)), "online_movable")
    return m


def _in_use() -> Machine:
    m = _online()
    user = User(m, "user", "anon", 3000, policy=new_policy(m, "bind", [1]), tokens=True)
    user.grow(3000)
    user.write_tokens(0, range(3000))
    return m


def _pools() -> Machine:
    m = two_nodes("memhp_default_state=online_kernel hugepages=5")
    m.plug("a", 1, DIMM, 1 << 30)
    m.write("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "1")
    return m


def _plugged() -> Machine:
    m = two_nodes()
    m.plug("a", 1, DIMM, BLOCKS * BLOCK, sta=0)
    m.dimms["a"].sta = 0xF
    return m


def _write(word: str) -> Callable[[Machine], object]:
    return lambda m: m.write(STATE, word)


MMOM = "memhp_default_state=offline memory_hotplug.memmap_on_memory=1"

Chain = tuple[Callable[[], Machine], Callable[[Machine], object]]
CHAINS: dict[str, Chain] = {
    "add": (_empty, lambda m: mh.add_memory(m, 1, DIMM, BLOCKS * BLOCK)),
    "add with its own memmap": (
        lambda: _empty(MMOM),
        lambda m: mh.add_memory(m, 1, DIMM, BLOCK, mh.MHP_MEMMAP_ON_MEMORY),
    ),
    "add driver managed": (
        _empty,
        lambda m: mh.add_memory_driver_managed(m, 1, DIMM, BLOCK, "System RAM (kmem)"),
    ),
    "add pages": (_empty, lambda m: mh.__add_pages(m, 1, DIMM >> 12, BLOCKS << 15)),
    "static group": (_empty, lambda m: memory_group_register_static(m, 1, 32768)),
    "dynamic group": (_empty, lambda m: memory_group_register_dynamic(m, 1, 32768)),
    "online": (_added, _write("online")),
    "online_kernel": (_added, _write("online_kernel")),
    "online_movable": (_added, _write("online_movable")),
    "online with its own memmap": (lambda: _added(MMOM), _write("online_movable")),
    "offline": (_online, _write("offline")),
    "offline in use": (_in_use, _write("offline")),
    "offline with its own memmap": (lambda: _online(MMOM), _write("offline")),
    "probe": (_empty, lambda m: m.write("/sys/devices/system/memory/probe", f"{DIMM:#x}")),
    "ACPI attach": (
        _plugged,
        lambda m: acpi_memory_device_add(m, m.acpi_devices[0]),
    ),
    "remove": (
        lambda: _added(blocks=BLOCKS),
        lambda m: mh.remove_memory(m, DIMM, BLOCKS * BLOCK),
    ),
    "pages in a row": (_empty, lambda m: alloc_contig_pages(m, 600, 0xCC0, 0)),
    "huge pages reserved": (_pools, lambda m: HugetlbUser(m, "huge", 3)),
    "huge page made smaller ones": (_pools, lambda m: demote(m, m.hstates[0], 1, None)),
    "offline and remove": (
        lambda: _online(blocks=3),
        lambda m: mh.offline_and_remove_memory(m, DIMM, 3 * BLOCK),
    ),
}


def calls_of(chain: str) -> Counter[str]:
    """How often a chain calls each fallible function."""
    make, act = CHAINS[chain]
    m = make()
    probes = m.trace()
    act(m)
    counts: Counter[str] = Counter()
    for _, name, times in probes.calls:
        counts[str(name)] += int(str(times))
    return Counter({name: n for name, n in counts.items() if name in FALLIBLE})


def steps() -> list[tuple[str, str, int]]:
    found = []
    for chain in CHAINS:
        for name, n in sorted(calls_of(chain).items()):
            # Of the notifications only the first, of what is going to happen, can be refused.
            last = 1 if name == "memory_notify" else n
            if name == "check_hotplug_memory_range" and "remove" in chain:
                continue  # BUG_ON: whoever removes has to know what was added
            found += [(chain, name, nth) for nth in sorted({1, (last + 1) // 2, last})]
    return found


STEPS = steps()
# Free lists come back in another order; per-CPU lists are drained.
OTHER_ORDER = ("offline and remove", "offline in use")
# When these fail, pages have moved already, in the kernel too.
AFTER_MIGRATION = ("dissolve_free_huge_pages", "test_pages_isolated")


@pytest.mark.parametrize(("chain", "function", "nth"), STEPS)
def test_a_failing_step_leaves_the_machine_as_it_was(chain: str, function: str, nth: int) -> None:
    make, act = CHAINS[chain]
    m = make()
    before = dump(m)
    probes = m.trace(recording=False)
    probes.fail(function, errno.ENOMEM, nth)
    try:
        act(m)
    except KernelError as e:
        # A device whose every range failed says EINVAL, whatever the ranges failed with.
        assert e.errno == errno.ENOMEM or (chain == "ACPI attach" and e.why == "add_memory failed")
        if "user" in m.users and function in AFTER_MIGRATION:
            assert m.users["user"].read_tokens(0, 3000).tolist() == list(range(3000))
            return
        compare = settled_differences if chain in OTHER_ORDER else differences
        assert compare(before, dump(m)) == []
    else:
        # A memmap can do without a large page, migration is tried again, and where one range
        # cannot be had, the next may.
        if function != "__alloc_pages":
            assert function in ("alloc_migration_target", "alloc_contig_range")
        else:
            assert m.vmemmap_basepages
    assert probes.pending() == []
    m.kprobes = None
    if chain != "add pages":  # sections without blocks, if it succeeded
        m.validate()


def test_every_fallible_function_is_reached() -> None:
    assert {function for _, function, _ in STEPS} == FALLIBLE


@pytest.mark.parametrize("name", ["zone_for_pfn_range", "no_such_function", ""])
def test_only_what_can_fail_is_told_to(m: Machine, name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"allowed: .*__add_memory"):
        m.trace().fail(name, errno.ENOMEM)
    with pytest.raises(InvalidArgument, match="nth: 0"):
        m.trace().fail("add_memory", errno.ENOMEM, 0)
    m.validate()
