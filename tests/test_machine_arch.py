"""Files of other architectures: refused by name, whatever tells it."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from kmm import ConfigError
from kmm.cli import main
from kmm.import_machine import as_json, build, import_machine
from kmm.machine_arch import CPUINFO, LSCPU, UNAME, architecture
from kmm.machine_files import Collected
from tests.conftest import recording
from tests.test_from_files import save

ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
"""
X86 = """processor\t: 0
vendor_id\t: GenuineIntel
flags\t\t: fpu vme de pse lm constant_tsc
"""


@pytest.fixture
def files() -> dict[str, str]:
    return {p: t for p, t in recording("movable_node")["steps"][0]["files"].items() if p[0] == "/"}


@pytest.mark.parametrize(
    ("path", "text", "name"),
    [
        (CPUINFO, ARM, "aarch64"),
        (CPUINFO, ARM.replace("architecture: 8", "architecture: 7"), "arm"),
        (CPUINFO, X86, "x86_64"),
        (CPUINFO, X86.replace(" lm ", " "), "i686"),
        (CPUINFO, "vendor_id       : IBM/S390\n# processors    : 4\n", "s390x"),
        (CPUINFO, "processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", "ppc64"),
        (CPUINFO, "processor\t: 0\nhart\t\t: 0\nisa\t\t: rv64imafdc\n", "riscv64"),
        (CPUINFO, "something\t: else\n", ""),
        (UNAME, "Linux aarch64 6.1.0 #1 SMP Debian 6.1 (2024-01-01) x86_64 GNU/Linux", "x86_64"),
        (
            UNAME,
            "Linux x86_64 5.14.0 #1 SMP Thu Jan 1 aarch64 aarch64 aarch64 GNU/Linux",
            "aarch64",
        ),
        (UNAME, "", ""),
        (LSCPU, "Architecture:                       ppc64le\nByte Order: Little", "ppc64le"),
    ],
)
def test_what_tells_it(path: str, text: str, name: str) -> None:
    assert architecture({path: text}) == (name, path if name else "")


def test_the_kernels_own_word_goes_before_the_processors() -> None:
    told = {CPUINFO: X86, UNAME: "Linux h 6.1 #1 SMP i686 GNU/Linux", LSCPU: "Architecture: x86_64"}
    assert architecture(told) == ("i686", UNAME)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (CPUINFO, ARM),
        (UNAME, "Linux h 6.1 #1 SMP aarch64 GNU/Linux\n"),
        (LSCPU, "Architecture: aarch64\n"),
    ],
)
def test_a_tree_of_arm64_is_refused_by_name(
    tmp_path: Path, files: dict[str, str], path: str, text: str
) -> None:
    root = tmp_path / "host-1"
    save({**files, f"/{path}": text}, root)
    with tarfile.open(tmp_path / "host.tar.gz", "w:gz") as tar:
        tar.add(root, "host-1")
    for source in (root, tmp_path / "host.tar.gz"):
        out = CliRunner().invoke(main, ["import", str(source), "-o", str(tmp_path / "m.json")])
        said = (
            f"Error: {source}: {path}: a machine of architecture 'aarch64'; allowed: x86_64, the "
            "architecture that kmm models\n"
        )
        assert (out.exit_code, out.output[-len(said) :]) == (2, said)
    assert not (tmp_path / "m.json").exists()


def test_a_tree_of_x86_is_taken_and_its_cpuinfo_is_not_kept(
    tmp_path: Path, files: dict[str, str]
) -> None:
    save({**files, f"/{CPUINFO}": X86 * 200}, tmp_path / "host")
    twin = import_machine(tmp_path / "host")
    assert architecture(twin.collected.told) == ("x86_64", CPUINFO)
    assert "GenuineIntel" not in as_json(twin.collected)
    assert "/proc/cpuinfo" not in twin.report.hidden
    twin.machine.validate()


def test_zones_tell_it_where_nothing_else_does(files: dict[str, str]) -> None:
    """On arm64, zone DMA ends at 1 or 4 GiB."""
    text = re.sub(
        r"(zone +DMA\n(?:.*\n)*? +spanned +)\d+", r"\g<1>262143", files["/proc/zoneinfo"], count=1
    )
    with pytest.raises(ConfigError) as e:
        build(Collected("test", {**files, "/proc/zoneinfo": text}))
    assert str(e.value) == (
        "/proc/zoneinfo: node 0 zone DMA: ends at page 262144, on x86 at 4096 or before: a machine "
        "of another architecture; allowed: x86_64, the architecture that kmm models"
    )


def test_a_report_says_that_it_was_assumed(files: dict[str, str]) -> None:
    report = build(Collected("test", files)).report
    assert any("x86-64" in line for line in report.as_dict()["assumed_always"])
