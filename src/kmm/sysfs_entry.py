"""One entry of the modelled tree: a file with its handlers, a link, or a directory.

With the parsers and the files that all devices share (drivers/base, lib/kstrtox.c).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from kmm.errors import kernel_error
from kmm.params import PAGE_SIZE

if TYPE_CHECKING:
    from kmm.machine import Machine

Reader = Callable[["Machine"], str]
Writer = Callable[["Machine", str], None]
BinaryReader = Callable[["Machine", int, int], bytes]

CPULIST_FILE_MAX_BYTES = 8192 * 7 // 2  # of as many CPUs as the reference build has


@dataclass(frozen=True, slots=True)
class Entry:
    """A file (read and/or write set), a link (link set) or a directory (names set).

    ``size`` is what stat(2) says of a file of sysfs, in bytes.  A file of binary records has
    ``read_at`` instead of a text: at most so many bytes from an offset on.
    """

    mode: int = 0o444
    read: Reader | None = None
    write: Writer | None = None
    link: str | None = None
    names: Iterable[str] | None = None
    proc: bool = False
    size: int = PAGE_SIZE
    read_at: BinaryReader | None = None


def directory(names: Iterable[str]) -> Entry:
    """A directory with these names in it, which are asked for only if it is listed."""
    return Entry(mode=0o755, names=names)


def readonly(read: Reader) -> Entry:
    """A file that can only be read (0444)."""
    return Entry(read=read)


def cpulist(read: Reader) -> Entry:
    """A file with a list of CPUs, as long as one of all possible CPUs could be."""
    return Entry(read=read, size=CPULIST_FILE_MAX_BYTES)


def uevent_file(devpath: str, subsystem: str, text: Callable[[], str] | None = None) -> Entry:
    """A device's ``uevent`` file: what is written is sent, what is read comes along with it.

    :param text: what is read; None for a device that adds nothing of its own.
    """
    return Entry(
        0o644,
        lambda m: text() if text else "",
        lambda m, t: synthetic_uevent(m, devpath, subsystem, t),
    )


def link(target: str) -> Entry:
    """A symbolic link."""
    return Entry(mode=0o777, link=target)


_ACTIONS = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")
POWER = (
    "async",
    "autosuspend_delay_ms",
    "control",
    "runtime_active_kids",
    "runtime_active_time",
    "runtime_enabled",
    "runtime_status",
    "runtime_suspended_time",
    "runtime_usage",
)


#: A number in a path: decimal, without leading zeros, and never too long for ``int``.
NUMBER = r"(0|[1-9][0-9]{0,9})"


def numbered(prefix: str, name: str) -> int | None:
    """Return the number in a name such as ``node12``; None for any other name."""
    match = re.fullmatch(prefix + NUMBER, name)
    return int(match[1]) if match else None


def word(text: str) -> str:
    """Return what sysfs_streq compares: the text without one trailing newline."""
    return text[:-1] if text.endswith("\n") else text


def stored_text(entry: Entry, data: bytes) -> str:
    """Return what a store sees of one write(2): its first page, and nothing behind a NUL.

    A sysctl sees a byte less.
    """
    return data[: PAGE_SIZE - entry.proc].partition(b"\0")[0].decode("latin-1")


def kstrtobool(text: str) -> bool:
    """Parse a boolean as the kernel does.

    :raises InvalidArgument: for anything else.
    """
    first, second = text[:1], text[1:2]
    if first in ("1", "y", "Y", "t", "T"):
        return True
    if first in ("0", "n", "N", "f", "F"):
        return False
    if first in ("o", "O") and second in ("n", "N"):
        return True
    if first in ("o", "O") and second in ("f", "F"):
        return False
    raise kernel_error(-errno.EINVAL, f"{word(text)!r}; allowed: 1, y, t, on, 0, n, f, off")


def kstrtoull(text: str, bits: int = 64) -> int:
    """Parse an unsigned number with its base read off its prefix.

    :raises InvalidArgument: if it is none; OutOfRange: if it has more than ``bits`` bits.
    """
    match = re.fullmatch(r"\+?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\n?", text)
    if not match:
        raise kernel_error(-errno.EINVAL, f"{word(text)!r}; allowed: an unsigned number")
    digits = match[1].lower()
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] != "x"
    # Python refuses to read thousands of digits, and none of 64 bits has so many.
    long = len(digits.removeprefix("0x").lstrip("0")) > 64
    value = 0 if long else int(digits, 8 if octal else 0)
    if long or value >> bits:
        raise kernel_error(-errno.ERANGE, f"{word(text)!r}; allowed: below 2^{bits}")
    return value


# What may follow an action: a UUID, then words that are given values.
_SYNTH_ARGUMENTS = re.compile(
    r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}( [0-9a-zA-Z]+=[0-9a-zA-Z]+)*", re.ASCII
)
# Directories of a bus, which is not a device of one: what is sent for them reaches nobody.
_ROOTS = ("/devices/system/memory", "/devices/system/node")


def synthetic_uevent(
    m: Machine, devpath: str, subsystem: str, text: str, heard: bool = True
) -> None:
    """Send the uevent that was written to a device's ``uevent`` file.

    :raises InvalidArgument: for a word that is no action, with the kernel's log lines.
    """
    action, more, arguments = word(text).partition(" ")
    wrong = ""
    if action not in _ACTIONS:
        wrong = "unknown uevent action string"
    elif more and not _SYNTH_ARGUMENTS.fullmatch(arguments):
        wrong = "incorrect uevent action arguments"
    if wrong:
        m.printk(f"synth uevent: {devpath}: {wrong}")
        if devpath.startswith("/devices/"):
            name = devpath.rsplit("/", 1)[1]
            m.printk(f"{subsystem} {name}: uevent: failed to send synthetic uevent: -22")
        raise kernel_error(-errno.EINVAL, f"uevent: {action!r}; allowed: {', '.join(_ACTIONS)}")
    if heard and devpath not in _ROOTS:
        m.uevent(action, devpath, subsystem)


# The words that files of a device's power take, the default first.
_POWER_WORDS = {"async": ("disabled", "enabled"), "control": ("auto", "on")}


def _no_autosuspend() -> NoReturn:
    raise kernel_error(-errno.EIO, "autosuspend_delay_ms: the device does not suspend by itself")


def power_file(m: Machine, match: re.Match[str]) -> Entry | None:
    """Return a file of a device's ``power`` directory; memory has no power management."""
    path, name = match[1], match[2]
    texts = {"runtime_status": "unsupported\n", "runtime_enabled": "disabled\n"}
    if name in _POWER_WORDS:
        key, allowed = f"{path}/power/{name}", _POWER_WORDS[name]

        def store(m: Machine, text: str) -> None:
            if word(text) not in allowed:
                what = f"{name}: {word(text)!r}; allowed: {', '.join(allowed)}"
                raise kernel_error(-errno.EINVAL, what)
            m.sysfs_values[key] = word(text) + "\n"

        return Entry(0o644, lambda m: m.sysfs_values.get(key, allowed[0] + "\n"), store)
    if name == "autosuspend_delay_ms":
        return Entry(0o644, lambda m: _no_autosuspend(), lambda m, t: _no_autosuspend())
    if name in POWER:
        return readonly(lambda m: texts.get(name, "0\n"))
    return None
