"""Which architecture a machine's files are of: kmm models x86-64 and refuses all others by name.

On another one the same files mean other things: zones end elsewhere, blocks of other sizes come and
go by other rules, and on arm64 no memory of the boot ever goes offline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kmm.errors import ConfigError, shown
from kmm.params import MAX_DMA_PFN
from kmm.zoneinfo import parse_zoneinfo, zone_number

UNAME, LSCPU = "sos_commands/kernel/uname_-a", "sos_commands/processor/lscpu"
CPUINFO, _ZONEINFO = "proc/cpuinfo", "/proc/zoneinfo"
#: Files that tell it, the most certain first.
ARCH_FILES = (UNAME, LSCPU, CPUINFO)
#: So much of such a file is enough, bytes.
ARCH_TEXT = 8192
_ALLOWED = "allowed: x86_64, the architecture that kmm models"
#: What /proc/cpuinfo has on one architecture only.
_CPUINFO = (
    (r"^CPU implementer\s*:(?:.*\n)*?CPU architecture\s*: (?:8|AArch64)", "aarch64"),
    (r"^CPU (?:implementer|architecture)\s*:", "arm"),
    (r"^vendor_id\s*: IBM/S390", "s390x"),
    (r"^cpu\s*: POWER", "ppc64"),
    (r"^isa\s*: rv64", "riscv64"),
    (r"^isa\s*: rv32", "riscv32"),
    (r"^cpu family\s*: Loongson", "loongarch64"),
    (r"^flags\s*:.* lm(?: |$)", "x86_64"),
    (r"^flags\s*:", "i686"),
)


def architecture(told: Mapping[str, str]) -> tuple[str, str]:
    """Return the name of an architecture as uname(1) has it, and the file that tells it.

    :param told: texts of ARCH_FILES by path, those that there are.
    :return: two empty texts if none tells it.
    """
    words = told.get(UNAME, "").split()
    if len(words) > 3:
        return (words[-2] if words[-1] == "GNU/Linux" else words[-1]), UNAME
    if found := re.search(r"^Architecture: +(\S+)", told.get(LSCPU, ""), re.M):
        return found[1], LSCPU
    for pattern, name in _CPUINFO:
        if re.search(pattern, told.get(CPUINFO, ""), re.M | re.I):
            return name, CPUINFO
    return "", ""


def check_architecture(told: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Refuse a machine that is not of x86-64.

    Where no file says so outright, a zone DMA that ends beyond 16 MiB does: it is none of x86's.

    :param told: texts of ARCH_FILES; files: of /proc and /sys, by path.
    :raises ConfigError: naming the file, the architecture and what is allowed.
    """
    name, path = architecture(told)
    if name not in ("", "x86_64", "amd64"):
        raise ConfigError(f"{path}: a machine of architecture {shown(name)}; {_ALLOWED}")
    zones = parse_zoneinfo(files[_ZONEINFO])
    for key in zones:
        end = zone_number(zones, key, "start_pfn") + zone_number(zones, key, "spanned")
        if key[1] == "DMA" and end > MAX_DMA_PFN:
            raise ConfigError(
                f"{_ZONEINFO}: node {key[0]} zone DMA: ends at page {end}, on x86 at "
                f"{MAX_DMA_PFN} or before: a machine of another architecture; {_ALLOWED}"
            )
