"""Malformed writes, and what a real kernel answers to each.

The answers come from parsers of their own, character by character as the kernel's go.

usage: python -m tests.malformed [WRITES PER FILE]
"""

from __future__ import annotations

import errno
import random
import re
import sys
from collections.abc import Callable, Iterator

from kmm import KernelError, Machine
from kmm.snapshot import differences, dump
from kmm.sysfs import entries
from kmm.vm_sysctl import TUNABLES

PAGE = 4096
#: What a parser says of a text: an errno, or None where the kernel would take it.
Answer = int | None
MEMORY, NODE = "/sys/devices/system/memory", "/sys/devices/system/node"


def words(*allowed: str) -> Callable[[str], Answer]:
    """sysfs_streq with each of some words."""
    return lambda text: None if text.removesuffix("\n") in allowed else errno.EINVAL


def boolean(text: str) -> Answer:
    """Kstrtobool: the first character tells, of an o the second."""
    if text[:1] in tuple("yY1nN0tTfF") or text[:2].lower() in ("on", "of"):
        return None
    return errno.EINVAL


def number(base: int, bits: int, only: int | None = None, signed: bool = False):
    """kstrtoull and its kin; ``only`` is the errno if the caller knows just one."""

    def parse(text: str) -> Answer:
        rest = text.removesuffix("\n")
        if rest[:1] == "+" or (signed and rest[:1] == "-"):
            rest = rest[1:]
        radix = base
        if base == 0:
            hexadecimal = rest[:2].lower() == "0x" and rest[2:3] in tuple("0123456789abcdefABCDEF")
            radix = 16 if hexadecimal else 8 if rest[:1] == "0" else 10
            rest = rest[2:] if hexadecimal else rest
        value, digits = 0, "0123456789abcdef"[:radix]
        for char in rest:
            if char.lower() not in digits:
                return errno.EINVAL
            value = value * radix + digits.index(char.lower())
        if not rest:
            return errno.EINVAL
        return (only or errno.ERANGE) if value >> bits else None

    return parse


def uevent(text: str) -> Answer:
    """An action, alone; with more behind it the rest has to begin with a UUID."""
    action, _, more = text.removesuffix("\n").partition(" ")
    if action not in "add remove change move online offline bind unbind".split():
        return errno.EINVAL
    return errno.EINVAL if " " in text and not re.match(r"[0-9a-fA-F-]{36}", more) else None


def sysctl(low: int, high: int) -> Callable[[str], Answer]:
    """One number of proc_dointvec_minmax or proc_doulongvec_minmax: all mistakes are EINVAL."""

    def parse(text: str) -> Answer:
        rest = text.lstrip(" \t\n\v\f\r\xa0")
        sign = -1 if rest[:1] == "-" else 1
        rest = rest[1:] if sign < 0 else rest
        end = 0
        while end < len(rest) and rest[end] not in " \t\n":
            end += 1
        digits = rest[:end]
        if number(0, 64)(digits) is not None or digits[:1] == "+" or len(digits) > 20:
            return errno.EINVAL
        radix = 16 if digits[:2].lower() == "0x" else 8 if digits[0] == "0" else 10
        return None if low <= sign * int(digits, radix) <= high else errno.EINVAL

    return parse


def amount(low: int, high: int) -> Callable[[str], Answer]:
    """The same of bytes that are counted in pages: more than fit are ERANGE."""

    def parse(text: str) -> Answer:
        answer = sysctl(low, high)(text)
        return errno.ERANGE if answer and sysctl(high, (1 << 64) - 1)(text) is None else answer

    return parse


def at_most(
    high: int, low: int = 0, bits: int = 64, more: int | None = errno.EINVAL
) -> Callable[[str], Answer]:
    """A decimal number of so many bits with limits; ``more`` is the errno for more bits."""

    def parse(text: str) -> Answer:
        refused = number(10, bits, more)(text)
        if refused:
            return refused
        return None if low <= int(text.lstrip("+")) <= high else errno.EINVAL

    return parse


def lru_gen(text: str) -> Answer:
    """Kstrtobool's letters for none and all, else a number."""
    return None if text[:1] in tuple("nNyY") else number(0, 32, errno.EINVAL)(text)


def probe(text: str) -> Answer:
    """A multiple of the block's size, which then has to be free."""
    refused = number(0, 64)(text)
    if refused is None and int(text.lstrip("+"), 0 if text.strip("+0\n") else 10) % (128 << 20):
        return errno.EINVAL
    return refused


def dax_id(text: str) -> Answer:
    """A device's name."""
    return None if re.fullmatch(r"dax-?[0-9]+\.-?[0-9]+\n?", text) else errno.EINVAL


ONLINE = ("online", "online_kernel", "online_movable", "offline")
INT, UINT = (1 << 31) - 1, (1 << 32) - 1
THP = "/sys/kernel/mm/transparent_hugepage"
DEFRAG = ("always", "defer", "defer+madvise", "madvise", "never")
SHMEM = ("always", "within_size", "advise", "never", "deny", "force")
Rule = tuple[str, Callable[[str], Answer], tuple[str, ...]]
#: What files take, by their paths, and words that they know.
RULES: tuple[Rule, ...] = (
    (rf"{MEMORY}/memory[0-9]+/state|{MEMORY}/auto_online_blocks", words(*ONLINE), ONLINE),
    (r".*/online|.*/auto_movable_numa_aware", boolean, ("1", "0", "on", "off", "y")),
    (r".*/power/control", words("auto", "on"), ("auto", "on")),
    (r".*/power/async", words("disabled", "enabled"), ("disabled", "enabled")),
    (r".*/power/autosuspend_delay_ms", lambda t: errno.EIO, ("0", "-1")),
    (r"/sys/bus/.*/drivers_probe", lambda t: errno.ENODEV, ("memory99", "node")),
    (r".*/uevent", uevent, ("add", "online", "change", "add SYNTH")),
    (rf"{MEMORY}/probe", probe, ("0x100000000", "0x108000000")),
    (rf"{MEMORY}/(soft|hard)_offline_page", number(0, 64, errno.EINVAL), ("0x100000000",)),
    (r".*/hotplug/memory/enabled", number(10, 1, errno.EINVAL), ("0", "1", "0x1", "2")),
    (r".*/online_policy", words("contig-zones", "auto-movable"), ("contig-zones",)),
    (r".*/auto_movable_ratio", number(0, 32), ("301", "0x10")),
    (r".*/transparent_hugepage/enabled", words("always", "madvise", "never"), ("always",)),
    (rf"{THP}/defrag", words(*DEFRAG), DEFRAG),
    (rf"{THP}/shmem_enabled", words(*SHMEM), SHMEM),
    (rf"{THP}/(use_zero_page|khugepaged/defrag)", at_most(1, more=None), ("0", "1")),
    (rf"{THP}/khugepaged/max_ptes_.*", at_most(511), ("0", "511")),
    (rf"{THP}/khugepaged/pages_to_scan", at_most(UINT, 1), ("1", str(UINT))),
    (rf"{THP}/khugepaged/.*_millisecs", at_most(UINT), ("0", str(UINT))),
    (r".*/ksm/max_page_sharing", at_most(INT, 2, 31, None), ("2", str(INT))),
    (r".*/ksm/merge_across_nodes", at_most(1, more=None), ("0", "1")),
    (r".*/ksm/run", at_most(2), ("0", "2")),
    (r".*/(ksm/use_zero_pages|demotion_enabled|vma_ra_enabled)", boolean, ("0", "y", "on")),
    (r".*/ksm/.*", at_most(UINT), ("0", str(UINT))),
    (r".*/lru_gen/enabled", lru_gen, ("y", "n", "0x3")),
    (r".*/lru_gen/min_ttl_ms", number(0, 32, errno.EINVAL), ("0", "0x10")),
    (r"/proc/sys/vm/nr_.*hugepages.*", sysctl(0, (1 << 64) - 1), ("0", "7")),
    (r".*/(nr_hugepages(_mempolicy)?|demote)", number(10, 64), ("0", "12", "0x1")),
    (r".*2048kB/nr_overcommit_hugepages", number(10, 64), ("0", "7")),
    (r".*/demote_size", lambda t: None if t[:1].isdigit() else errno.EINVAL, ("2M", "2048kB")),
    (r".*/eject", lambda t: None if t[:1] == "1" else errno.EINVAL, ("1", "11")),
    (r".*/actions/.*/error", number(0, 63, None, True), ("-22", "0", "-4095")),
    (r".*/(un)?bind", lambda t: None if "dax0.0" in t else errno.ENODEV, ("dax0.1", "DAX0.0")),
    (r".*/(new|remove)_id", dax_id, ("dax0.0", "dax1.0")),
    (r"/proc/sys/vm/drop_caches", sysctl(1, 4), ("1", "3")),
    (r"/proc/sys/vm/hugetlb_shm_group", sysctl(-INT - 1, INT), ("0", "7")),
    (r"/proc/sys/vm/dirty_bytes", amount(8192, UINT * PAGE), ("8191", "8192")),
    (r"/proc/sys/vm/dirty_background_bytes", amount(1, UINT * PAGE), ("0", "1")),
    (
        r"/proc/sys/vm/hugetlb_optimize_vmemmap",
        sysctl(1 - (1 << 64), (1 << 64) - 1),
        ("0", "1"),
    ),
    (
        r"/proc/sys/vm/numa_zonelist_order",
        lambda t: None if t[:1] in tuple("dDnN") else errno.EINVAL,
        ("Node", "default", "zone"),
    ),
    *(
        (f"/proc/sys/vm/{t.name}", sysctl(t.low, t.high), ("0", "1", str(t.high)))
        for t in TUNABLES.values()
    ),
)
#: What takes anything, or all that it can parse of it.
ANYTHING = (
    rf"{NODE}/node[0-9]+/compact",
    r"/proc/sys/vm/(compact_memory|stat_refresh|lowmem_reserve_ratio)",
    r".*1048576kB/nr_overcommit_hugepages",  # refuses everything
    r".*/drivers_autoprobe",
)


def rule(path: str) -> Rule | None:
    """Return the rule for a file, None for one that takes anything."""
    if any(re.fullmatch(pattern, path) for pattern in ANYTHING):
        return None
    return next(r for r in RULES if re.fullmatch(r[0], path))


def seen(value: str, proc: bool) -> str:
    """Return what the parser sees of a value that is written with a newline behind it."""
    text = f"{value}\n".encode().decode("latin-1")
    return text[: PAGE - proc].partition("\0")[0]


_NUMBERS = """-1 -0 + - 0x 0X 08 1e3 0b1 1_000 18446744073709551616 9223372036854775808
    -9223372036854775809 99999999999999999999999999 0xfffffffffffffffff 4294967296 2147483648
    \u0661 1.5 ++1 +-1 --1 0x-1 1,2 NaN inf""".split()


def values(known: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    """Yield what a careless or hostile writer might write, without end."""
    blanks = (" ", "\t", "\n", "\r", "\v", "\xa0", "\0", "\x7f")
    yield from ("", "x" * (1 << 20), "\0" * (1 << 20), "9" * (1 << 20), " " * 5000, *_NUMBERS)
    while True:
        word = rng.choice(known)
        kind = rng.randrange(8)
        at = rng.randrange(len(word) + 1)
        if kind == 0:
            yield "".join(c.swapcase() if rng.random() < 0.5 else c for c in word)
        elif kind == 1:
            yield rng.choice(blanks) * rng.randrange(1, 4) + word
        elif kind == 2:
            yield word + rng.choice(blanks) + rng.choice((*known, "", "x"))
        elif kind == 3:
            yield word[:at] + rng.choice((*blanks, "-", "x", "ü", "\ud7ff")) + word[at:]
        elif kind == 4:
            yield rng.choice(("-", "+", "0x", "00")) + word
        elif kind == 5:
            yield rng.choice(_NUMBERS) + rng.choice(("", "0", "x", " 1"))
        elif kind == 6:
            yield str(rng.choice((-1, 1)) * rng.getrandbits(rng.randrange(1, 100)))
        else:
            yield rng.randbytes(rng.randrange(1, 64)).decode("latin-1")


def writable(m: Machine) -> list[tuple[str, bool]]:
    """Return every file that can be written, and whether it is one of /proc."""
    found = [(p, e) for p, e in entries(m) if e.write is not None and e.mode & 0o222]
    return [(path, entry.proc) for path, entry in found]


def check(m: Machine, path: str, proc: bool, count: int, seed: int = 0) -> int:
    """Write what is malformed to a file until the kernel has refused ``count``; return how many.

    :raises AssertionError: for another errno than the kernel's, or a machine that has changed.
    """
    found = rule(path)
    if found is None:
        return 0
    rng = random.Random(f"{seed} {path}")
    before, done = dump(m), 0
    for tried, value in enumerate(values(found[2], rng)):
        if done == count or tried == 40 * count + 100:
            break
        want = found[1](seen(value, proc))
        if want is None:
            continue
        try:
            m.write(path, value)
            have = 0
        except KernelError as e:
            have = e.errno or 0
        assert have == want, f"{path}: {value[:80]!r}: errno {have}; the kernel's: {want}"
        done += 1
    changed = differences(before, dump(m))
    assert not changed, f"{path}: {changed[:3]}"
    return done


def main() -> None:
    """Do all of it, and say how many were refused."""
    from tests.test_programs import four_dimms

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    m, files, total = four_dimms(soft_reserved="512M"), 0, 0
    for path, proc in writable(m):
        done = check(m, path, proc, count)
        m.log.clear()
        files, total = files + (done > 0), total + done
    m.validate()
    print(f"{total} malformed writes to {files} files, {count} each: the kernel's errno, no change")


if __name__ == "__main__":
    main()
