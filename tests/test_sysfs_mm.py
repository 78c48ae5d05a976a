"""/sys/kernel/mm beside the pools of huge pages: what a real 6.1 shows there, and takes."""

from __future__ import annotations

import pytest

from kmm import KernelError, Machine

MM = "/sys/kernel/mm/"
THP = "transparent_hugepage/"
KHUGEPAGED = THP + "khugepaged/"


def test_the_directories_are_those_of_a_real_kernel(m: Machine) -> None:
    assert m.listdir(MM) == ["hugepages", "ksm", "lru_gen", "numa", "swap", THP[:-1]]
    assert m.listdir(MM + "lru_gen") == ["enabled", "min_ttl_ms"]
    assert m.listdir(MM + THP) == sorted(
        "defrag enabled hpage_pmd_size khugepaged shmem_enabled use_zero_page".split()
    )
    assert len(m.listdir(MM + KHUGEPAGED)) == 9
    assert len(m.listdir(MM + "ksm")) == 14


# What a real kernel showed after each write; an errno where it refused.
@pytest.mark.parametrize(
    ("name", "first", "written"),
    [
        ("ksm/run", "0", {"2": "2", "3": "EINVAL", "18446744073709551616": "EINVAL"}),
        ("ksm/max_page_sharing", "256", {"2": "2", "1": "EINVAL", "2147483648": "ERANGE"}),
        (
            "ksm/merge_across_nodes",
            "1",
            {"0": "0", "2": "EINVAL", "18446744073709551616": "ERANGE"},
        ),
        ("ksm/pages_to_scan", "100", {"2147483648": "2147483648", "4294967296": "EINVAL"}),
        ("ksm/use_zero_pages", "0", {"101": "1", "n": "0", "2": "EINVAL"}),
        ("lru_gen/enabled", "0x0000", {"y": "0x0007", "100": "0x0004", "true": "EINVAL"}),
        ("lru_gen/min_ttl_ms", "0", {"33": "36", "2147483648": "4294967288", "x": "EINVAL"}),
        ("numa/demotion_enabled", "false", {"1 2": "true", "0": "false", "abc": "EINVAL"}),
        ("swap/vma_ra_enabled", "true", {"n": "false", "2": "EINVAL"}),
        (KHUGEPAGED + "max_ptes_none", "511", {"257": "257", "65536": "EINVAL"}),
        (KHUGEPAGED + "pages_to_scan", "4096", {"0": "EINVAL", "1": "1"}),
        (KHUGEPAGED + "defrag", "1", {"0": "0", "2": "EINVAL"}),
        (
            THP + "defrag",
            "always defer defer+madvise [madvise] never",
            {"defer": "always [defer] defer+madvise madvise never", "force": "EINVAL"},
        ),
        (
            THP + "shmem_enabled",
            "always within_size advise [never] deny force",
            {"force": "always within_size advise never deny [force]", "defer": "EINVAL"},
        ),
        (THP + "enabled", "[always] madvise never", {"never": "always madvise [never]"}),
    ],
)
def test_values(m: Machine, name: str, first: str, written: dict[str, str]) -> None:
    assert m.read(MM + name) == first + "\n"
    for value, shown in written.items():
        before = m.read(MM + name)
        if shown.startswith("E"):
            with pytest.raises(KernelError, match=shown):
                m.write(MM + name, value)
            shown = before.rstrip("\n")
        else:
            m.write(MM + name, value)
        assert m.read(MM + name) == shown + "\n"
    m.validate()


@pytest.mark.parametrize("name", [THP + "hpage_pmd_size", "ksm/full_scans"])
def test_what_only_tells_cannot_be_written(m: Machine, name: str) -> None:
    with pytest.raises(KernelError, match="EACCES"):
        m.write(MM + name, "1")
    assert m.read(MM + THP + "hpage_pmd_size") == "2097152\n"
    m.validate()
