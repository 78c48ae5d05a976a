"""Every recording is replayed, validated after each step and scored; scores only ever go up."""

from __future__ import annotations

import pytest

from kmm import Machine
from kmm.errors import ConfigError
from kmm.replay import boot_machine, replay, snapshot_files
from kmm.verify import compare
from tests.conftest import RECORDINGS, recording

#: Facts that must agree, of those compared.  Raise a figure when the model gets better.
REQUIRED = {
    "auto_movable": (1868, 1868),
    "auto_online": (188, 188),
    "bad_writes": (497, 497),
    "early_blocks": (278, 278),
    "early_blocks_4_gib": (495, 495),
    "early_four_nodes": (1759, 1759),
    "early_two_nodes": (1356, 1356),
    "four_nodes": (1419, 1419),
    "iso_first_blocks": (436, 436),
    "iso_first_blocks_5g": (348, 348),
    "kernel_zone": (854, 854),
    "kernelcore_thp_never": (2307, 2307),
    "memmap_on_memory": (913, 913),
    "more_bad_writes": (6259, 6259),
    "movable_node": (807, 807),
    "odd_node_sizes": (1113, 1113),
    "platform_refuses": (430, 430),
    "probe": (577, 577),
    "random_2": (5129, 5129),
    "random_384_mib": (2097, 2097),
    "random_3_gib": (5988, 5988),
    "random_auto_movable": (3005, 3005),
    "random_four_cpus": (3266, 3266),
    "random_kernel_zone": (5518, 5518),
    "random_memmap_on_memory": (1983, 1983),
    "random_movable_node": (3739, 3739),
    "random_one_node": (1653, 1653),
    "unaligned": (122, 122),
    "unaligned_2": (1930, 1930),
    "veto": (707, 707),
    "veto_kernel_zone": (2501, 2501),
    "veto_values": (3668, 3668),
    "watermarks": (1386, 1386),
    "anon": (659, 659),
    "hugetlb": (937, 937),
    "hugetlb_gigantic": (2642, 2642),
    "hugetlb_kernel": (1807, 1807),
    "hugetlb_used": (1430, 1430),
    # Slow requests drain per-CPU lists even if reclaim got nowhere.
    "hugetlb_reserved": (2266, 2266),
    "kernel_pages": (210, 210),
    "migrate": (517, 517),
    "load_again": (978, 978),
    "load_four_cpus": (685, 685),
    "load_full_node": (504, 504),
    "load_hog_both_zones": (960, 960),
    "load_hog_lock": (515, 515),
    "load_hog_normal": (661, 661),
    "load_hog_thp": (672, 672),
    "load_tmpfs_files": (694, 694),
    "load_tmpfs_prefer": (395, 395),
    "load_two_hogs": (933, 933),
    "load_unplug_in_use": (385, 385),
    "load_hugetlb": (962, 964),
    "load_hugetlb_used": (748, 748),
    "load_interleave": (612, 612),
    "load_list": (775, 775),
    "load_mmom": (685, 685),
    "load_nearest": (756, 756),
    "load_tmpfs_grow": (899, 899),
    # In these the guest's own tasks show: see the recordings' README.
    "auto_movable_no_numa": (7940, 7968),
    "boot_6_gib": (3151, 3163),
    "first_node_empty": (3130, 3134),
    "five_nodes": (4799, 4859),
    "memmap_on_memory_kernel": (2856, 2875),
    "movable_node_holes": (3794, 3804),
    "random_cpu_nodes": (2464, 2508),
    "random_policy": (4513, 4575),
    "random_three_nodes": (5385, 5392),
    "small_boot_big_dimms": (6311, 6318),
    "tunables_odd": (2404, 2431),
    "compact_direct": (698, 698),
    "compact_files": (771, 771),
    "compact_mixed": (852, 852),
    "compact_proactive": (540, 540),
    "acpi_doors": (2400, 2400),
    "bad_writes_more": (3824, 3824),
    "hwpoison_errors": (2276, 2276),
    "soft_offline": (995, 995),
}


def test_every_recording_has_a_required_score() -> None:
    assert set(REQUIRED) == {p.stem for p in RECORDINGS.glob("*.json")}


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_recording_agrees(name: str) -> None:
    real = recording(name)
    score = compare(real, replay(real, name, check=True))
    good, total = sum(score.good.values()), sum(score.total.values())
    assert total == REQUIRED[name][1]
    assert good >= REQUIRED[name][0], "\n".join(score.differences[:5])


def test_replay_reads_only_what_a_stripped_recording_has() -> None:
    real = recording("movable_node")
    bare = {
        "machine": real["machine"],
        "steps": [real["steps"][0], *({"step": s["step"]} for s in real["steps"][1:])],
    }
    assert replay(bare)["steps"][1:] == replay(real)["steps"][1:]


def test_replaying_twice_gives_the_same_machine_bit_for_bit() -> None:
    real = recording("memmap_on_memory")
    assert replay(real) == replay(real)


@pytest.mark.parametrize("name", ["movable_node", "four_nodes", "probe", "random_3_gib"])
def test_boot_gives_the_recorded_texts_back(name: str) -> None:
    real = recording(name)
    m = boot_machine(real)
    files = real["steps"][0]["files"]
    model = snapshot_files(m)
    for path in ("/proc/iomem", "/proc/buddyinfo"):
        assert [s.rstrip() for s in model[path].splitlines()] == [
            s.rstrip() for s in files[path].splitlines()
        ]
    free = files["/proc/pagetypeinfo"].split("Number of blocks")[0]
    assert free.split() == model["/proc/pagetypeinfo"].split("Number of blocks")[0].split()
    for path, text in files.items():
        if path.startswith("/sys/devices/system/") and not path.endswith("meminfo"):
            assert model[path] == text, path
    m.validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "steps"),
        ({"steps": [{"step": {"op": "boot"}}]}, r"steps\[0\].files: missing"),
        ({"machine": None}, "machine: None; allowed: an object"),
    ],
)
def test_a_broken_recording_is_named(change: dict, message: str) -> None:
    broken = {**recording("unaligned"), **change}
    with pytest.raises(ConfigError, match=message):
        replay(broken, "broken.json")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"op": "jump"}, "op: 'jump'; allowed: boot, pages"),
        (
            {"op": "plug", "id": "a", "node": 1, "addr": "x", "size": 1},
            "addr: 'x' is not a size; allowed",
        ),
        ({"op": "pages", "pfn": 0, "count": -1}, "count: -1; allowed: a number from 0 to"),
    ],
)
def test_a_broken_step_is_named(step: dict, message: str) -> None:
    broken = recording("unaligned")
    broken["steps"][1] = {"step": step}
    with pytest.raises(ConfigError, match=r"steps\[1\]\.step\." + message):
        replay(broken, "broken.json")


def test_the_size_of_struct_page_is_read_off_the_boot_messages_unless_described() -> None:
    assert boot_machine(recording("movable_node")).config.struct_page_size == 64
    small = recording("probe")
    assert boot_machine(small).config.struct_page_size == 56
    small["machine"]["struct_page_size"] = 64
    assert boot_machine(small).config.struct_page_size == 64
    m = Machine.from_files(small["steps"][0]["files"], {"struct_page_size": 56})
    assert m.config.struct_page_size == 56
    m.validate()
