"""Machines from the texts of real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kmm import GFP_HIGHUSER_MOVABLE, ConfigError, Machine
from kmm.from_files import read_tree
from kmm.params import ZONE_MOVABLE, ZONE_NORMAL
from kmm.replay import boot_machine, snapshot_files
from tests.conftest import DIMM, RECORDINGS, recording, two_nodes

VM = "/proc/sys/vm/"
BLOCK = 128 << 20
STATE = "/sys/devices/system/memory/memory{}/state"


def save(files: dict[str, str], root: Path) -> None:
    for path, text in files.items():
        target = root / path.lstrip("/")
        if path == "kthreads":
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if text == "link":
            target.symlink_to("nowhere")
        else:
            target.write_text(text + "\n")


@pytest.mark.parametrize("name", ["movable_node", "four_nodes", "veto", "random_3_gib"])
def test_a_saved_directory_makes_the_machine_that_was_saved(tmp_path: Path, name: str) -> None:
    files = recording(name)["steps"][0]["files"]
    save(files, tmp_path)
    m = Machine.from_files(read_tree(tmp_path))
    m.validate()
    shown = snapshot_files(m)
    for path in files:
        same = path.startswith("/sys/") and not path.endswith("meminfo")
        if same or path in ("/proc/iomem", "/proc/buddyinfo"):
            have = [line.rstrip() for line in shown[path].splitlines()]
            assert have == [line.rstrip() for line in files[path].splitlines()], path


def test_a_machine_in_the_middle_of_its_life_can_be_saved(tmp_path: Path) -> None:
    """Two DIMMs, three zones on node 1, one block offline."""
    files = recording("kernel_zone")["steps"][4]["files"]
    save(files, tmp_path)
    m = Machine.from_files(read_tree(tmp_path))
    m.validate()
    assert m.read("/proc/buddyinfo").split() == files["/proc/buddyinfo"].split()
    assert m.memory_blocks[43].state == "offline"
    assert m.nodes[1].zone(3).present_pages == 32768
    m.write("/sys/devices/system/memory/memory42/state", "offline")
    m.validate()


def lived() -> Machine:
    """Two nodes in use, pages on the lists of all CPUs, and a zone that is empty again."""
    m = two_nodes()
    m.plug("a", 1, DIMM, 5 * BLOCK)
    for block, kind in ((32, "movable"), (33, "movable"), (34, "kernel")):
        m.write(STATE.format(block), f"online_{kind}")
    m.free_pages_bulk(m.alloc_pages_bulk(1000, 0, GFP_HIGHUSER_MOVABLE, 1))
    for block in (32, 33):
        m.write(STATE.format(block), "offline")
    pfns = m.alloc_pages_bulk(1000)
    m.alloc_pages_bulk(30, 3, nid=1)
    m.free_pages_bulk(pfns[::3])
    for cpu in (0, 1):
        m.alloc_pages(cpu=cpu)
        m.free_pages(m.alloc_pages(2, nid=1, cpu=cpu), 2, cpu=cpu)
    return m


def texts(m: Machine) -> dict[str, str]:
    """All that read_tree takes of a machine, and what follows from it."""
    files = snapshot_files(m)
    more = ["/proc/vmstat", "/proc/cmdline"]
    for nid in m.n_online:
        more += [f"/sys/devices/system/node/node{nid}/{name}" for name in ("numastat", "vmstat")]
    return files | {path: m.read(path).rstrip("\n") for path in more}


def test_a_saved_machine_shows_the_same_texts(tmp_path: Path) -> None:
    m = lived()
    assert all(m.nodes[0].zone(1).pcp_state(cpu)[0] for cpu in (0, 1))
    for gone in (False, True):
        if gone:
            # Of a node that is offline only the sums of the whole machine tell.
            m = two_nodes()
            m.plug("a", 1, DIMM, BLOCK)
            m.write(STATE.format(32), "online_movable")
            m.free_pages(m.alloc_pages(0, GFP_HIGHUSER_MOVABLE, 1))
            m.unplug("a")
            assert 1 not in m.n_online
        files = texts(m)
        save(files, tmp_path / str(gone))
        again = Machine.from_files(read_tree(tmp_path / str(gone)))
        again.validate()
        again.kthreads = set(m.kthreads)
        shown = texts(again)
        for path, text in files.items():
            assert shown[path] == text, path
        assert shown.keys() == files.keys()


def test_pages_on_lists_go_back_when_memory_goes_offline() -> None:
    """All that is not free in the zone is on a CPU's list, so nothing stands in the way."""
    m = two_nodes()
    m.plug("a", 1, DIMM, 2 * BLOCK)
    for block in (32, 33):
        m.write(STATE.format(block), "online_movable")
    m.free_pages_bulk(m.alloc_pages_bulk(100, 0, GFP_HIGHUSER_MOVABLE, 1, cpu=1), cpu=1)
    again = Machine.from_files(texts(m))
    zone = again.nodes[1].zone(ZONE_MOVABLE)
    assert zone.pcp_state(1)[0] == zone.pcp_pages() == zone.managed_pages - zone.nr_free_pages > 0
    again.validate()
    for block in (32, 33):
        again.write(STATE.format(block), "offline")
    assert not zone.populated
    again.validate()


def test_more_pages_on_lists_than_can_be_are_as_many_as_there_can() -> None:
    m = lived()
    files = texts(m)
    files["/proc/zoneinfo"] = re.sub(r"count: \d+", "count: 9999999999", files["/proc/zoneinfo"])
    again = Machine.from_files(files)
    zone = again.nodes[1].zone(ZONE_NORMAL)
    assert zone.pcp_pages() == zone.managed_pages - zone.nr_free_pages
    again.validate()


def test_a_count_of_a_node_that_is_none_is_named() -> None:
    path = "/sys/devices/system/node/node0/numastat"
    files = texts(lived()) | {path: "numa_hit many"}
    with pytest.raises(ConfigError, match=path + ": numa_hit 'many'; allowed: a number"):
        Machine.from_files(files)


def test_without_block_devices_ram_is_online() -> None:
    files = recording("movable_node")["steps"][0]["files"]
    bare = {p: t for p, t in files.items() if "/system/memory/memory" not in p}
    m = Machine.from_files(bare)
    assert m.nodes[0].zone(1).present_pages == 258016
    m.validate()
    m.plug("a", 1, DIMM, 128 << 20) if 1 in m.nodes else None
    m.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"/proc/iomem": ""}, "/proc/iomem: missing"),
        ({"/proc/zoneinfo": "x"}, "/proc/zoneinfo: line 1: 'x' before any zone"),
        ({"/proc/zoneinfo": "Node 0, zone  Upper\n"}, "zone 'Upper'; allowed: DMA"),
        ({"/sys/devices/system/memory/memory3/state": "asleep"}, "'asleep'; allowed: online"),
        ({"/sys/devices/system/memory/block_size_bytes": "x"}, "block_size_bytes: 'x'; allowed"),
    ],
)
def test_bad_files_are_named(change: dict[str, str], message: str) -> None:
    files = {**recording("movable_node")["steps"][0]["files"], **change}
    with pytest.raises(ConfigError, match=message):
        Machine.from_files(files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "files: None; allowed: paths and their texts, as .*read_tree\\('/'\\) collects"),
        (5, "files: 5; allowed: paths and their texts"),
        ("saved", "files: 'saved'; allowed: .*read_tree\\('saved'\\)"),
        ([("/proc/iomem", "")], "files: \\[\\('/proc/iomem', ''\\)\\]; allowed"),
    ],
)
def test_what_is_no_mapping_of_files(files, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Machine.from_files(files)


def test_an_empty_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no /proc and /sys files"):
        read_tree(tmp_path)


def in_meminfo(text: str, name: str) -> int:
    match = re.search(rf"^{name}: +(\d+) kB", text, re.M)
    assert match is not None
    return int(match[1])


def reclaimable(text: str) -> int:
    """The half of the reclaimable slabs' pages, rounded up, that MemAvailable counts."""
    return (in_meminfo(text, "KReclaimable") // 4 + 1) // 2


@pytest.mark.parametrize("name", sorted(p.stem for p in RECORDINGS.glob("*.json")))
def test_memory_available_is_what_the_real_machine_reckoned(name: str) -> None:
    """Pages that went to per-CPU lists or slabs between two reads are in one figure only."""
    real = recording(name)
    text = real["steps"][0]["files"]["/proc/meminfo"]
    m = boot_machine(real)
    shown = m.read("/proc/meminfo")
    moved = in_meminfo(shown, "MemFree") - in_meminfo(text, "MemFree")
    moved += 4 * (reclaimable(shown) - reclaimable(text))
    assert in_meminfo(shown, "MemAvailable") == in_meminfo(text, "MemAvailable") + moved
    assert m.ratelimit_pages > 32
    m.validate()


def test_tunables_have_the_values_of_the_files() -> None:
    files = recording("movable_node")["steps"][0]["files"]
    wanted = {
        "min_free_kbytes": "50000",
        "watermark_scale_factor": "20",
        "watermark_boost_factor": "0",
        "percpu_pagelist_high_fraction": "8",
        "dirty_ratio": "40",
        "swappiness": "10",
        "admin_reserve_kbytes": "4096",
    }
    plain = Machine.from_files(files)
    ratios = {VM + "lowmem_reserve_ratio": "128\t64\t0\t0\t0"}
    m = Machine.from_files({**files, **ratios, **{VM + k: v for k, v in wanted.items()}})
    assert {k: m.read(VM + k).strip() for k in wanted} == wanted
    assert all(z.boost_factor == 0 for z in m.all_zones())
    assert m.vm.lowmem_reserve_ratio[:3] == [128, 64, 0]
    # Nothing is recomputed: the marks and reserves are those of the files.
    assert m.read("/proc/zoneinfo") == plain.read("/proc/zoneinfo")
    assert m.vm.user_min_free_kbytes == -1
    m.validate()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("watermark_scale_factor", "0", "'0'; allowed: 1 to 3000"),
        ("percpu_pagelist_high_fraction", "7", "'7'; allowed: 0 to"),
        ("swappiness", "ten", "'ten'; allowed: 0 to 200"),
        ("dirty_ratio", "5 5", "'5 5'; allowed: 0 to 100"),
        ("lowmem_reserve_ratio", "a b", "'a'; allowed: numbers"),
    ],
)
def test_a_tunable_that_the_kernel_would_not_take_is_named(
    name: str, text: str, message: str
) -> None:
    files = {**recording("movable_node")["steps"][0]["files"], VM + name: text}
    with pytest.raises(ConfigError, match=f"{VM}{name}: {message}"):
        Machine.from_files(files)
