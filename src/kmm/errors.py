"""The errors that kmm raises, one class per errno that the hot-plug code returns.

Every refusal by the modelled kernel is a :class:`KernelError`; callers catch either the
class of one errno or ``OSError`` and look at ``errno``, as a program on Linux would.
"""

from __future__ import annotations

import errno as _errno
import operator
import os
from collections.abc import Iterable
from typing import NoReturn

EHWPOISON = 133  # newer than the errno module of the older Pythons that kmm runs on


class KernelError(OSError):
    """A refusal by the modelled kernel, with the errno that a real one returns."""

    default_errno: int = 0
    #: Of an offline: the kernel's word for what went wrong, and the page in the way if it is one.
    reason: str = ""
    pfn: int | None = None

    def __init__(self, why: str = "", *, code: int | None = None) -> None:
        number = self.default_errno if code is None else code
        super().__init__(number, why or os.strerror(number))

    @property
    def why(self) -> str:
        """What kmm knows of the reason, beyond the errno's own text."""
        return str(self.strerror)

    def __str__(self) -> str:
        number = self.errno or 0
        name = {EHWPOISON: "EHWPOISON", **_errno.errorcode}.get(number, str(number))
        text = os.strerror(self.errno or 0)
        return f"{name} ({text})" if self.why == text else f"{name} ({text}): {self.why}"


class OperationNotPermitted(KernelError):
    """EPERM: a notifier said NOTIFY_BAD, or hot-plug is disabled."""

    default_errno = _errno.EPERM


class NoSuchFile(KernelError):
    """ENOENT: the modelled tree has no such file."""

    default_errno = _errno.ENOENT


class Interrupted(KernelError):
    """EINTR: a signal ended an offline that could not finish."""

    default_errno = _errno.EINTR


class InputOutputError(KernelError):
    """EIO: the page is there but its section is offline."""

    default_errno = _errno.EIO


class NoSuchDeviceOrAddress(KernelError):
    """ENXIO: no memory at that address."""

    default_errno = _errno.ENXIO


class ArgumentTooBig(KernelError):
    """E2BIG: the range lies beyond the addresses the kernel can map."""

    default_errno = _errno.E2BIG


class OutOfMemory(KernelError):
    """ENOMEM: no page for the kernel's own needs."""

    default_errno = _errno.ENOMEM


class AccessDenied(KernelError):
    """EACCES: the file's mode forbids it."""

    default_errno = _errno.EACCES


class Busy(KernelError):
    """EBUSY: pages of the range cannot move, or blocks are still online."""

    default_errno = _errno.EBUSY


class AlreadyExists(KernelError):
    """EEXIST: the range, section or block exists."""

    default_errno = _errno.EEXIST


class NoSuchDevice(KernelError):
    """ENODEV: no such device, or it cannot be ejected."""

    default_errno = _errno.ENODEV


class IsADirectory(KernelError):
    """EISDIR: a directory was read or written as a file."""

    default_errno = _errno.EISDIR


class NotADirectory(KernelError):
    """ENOTDIR: a file was listed as a directory."""

    default_errno = _errno.ENOTDIR


class InvalidArgument(KernelError):
    """EINVAL: a value, range or state that the kernel does not take."""

    default_errno = _errno.EINVAL


class HardwarePoisoned(KernelError):
    """EHWPOISON: the page is marked as broken already."""

    default_errno = EHWPOISON


class OutOfRange(KernelError):
    """ERANGE: a number that does not fit."""

    default_errno = _errno.ERANGE


class ConfigError(ValueError):
    """A machine description, scenario or saved file that kmm cannot use; names field and value."""


class FirmwareRefused(Exception):
    """The platform refuses a DIMM before the kernel hears of it (overlap, no slot, no node)."""


class ImpossibleState(AssertionError):
    """The modelled kernel would BUG here; the message starts with the function's name.

    Raised before anything is changed wherever what is given tells it.  What an operation had done
    before (blocks that an ejection took offline) stays: the kernel would be dead, so a machine
    that stopped inside an operation is to be looked at, not used any more.
    """


class ValidationError(AssertionError):
    """``Machine.validate`` found two accounts of one fact that disagree."""


_BY_ERRNO: dict[int, type[KernelError]] = {
    cls.default_errno: cls for cls in KernelError.__subclasses__()
}


def kernel_error(code: int, why: str = "") -> KernelError:
    """Return the exception for an errno.

    :param code: a positive or negative errno value, as kernel functions return it.
    :param why: what happened, in kmm's words.
    """
    number = abs(code)
    cls = _BY_ERRNO.get(number, KernelError)
    return cls(why, code=number)


def check(code: int, why: str = "") -> int:
    """Turn an engine result into an exception: a negative errno raises, the rest is returned.

    :param code: what an engine call returned; negative values are errnos.
    :param why: the message of the exception.
    :raises KernelError: for a negative code.
    """
    if code < 0:
        raise kernel_error(code, why)
    return code


def bug(where: str, what: str) -> NoReturn:
    """Stop at a state that the kernel would BUG on.

    :param where: the kernel function that noticed.
    :param what: what is impossible.
    :raises ImpossibleState: always.
    """
    raise ImpossibleState(f"{where}: {what}")


def shown(value: object) -> str:
    """Return a rejected value as a message shows it: its repr, cut to what fits a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # digits beyond Python's limit, nesting beyond its stack
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else text[:117] + "..."


def printable(text: str) -> str:
    """Return text with its control characters escaped, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def check_number(name: str, value: object, low: int, high: int) -> int:
    """Return an argument that has to be a whole number between two limits.

    :param name: the argument's name, for the message; low, high: what is allowed, inclusive.
    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise kernel_error(-22, f"{name}: {shown(value)}; allowed: a number from {low} to {high}")
    return number


def check_numbers(name: str, values: object, low: int, high: int) -> frozenset[int]:
    """Return an argument that has to be some whole numbers between two limits, as a set.

    :param name: the argument's name, for the message; low, high: what is allowed, inclusive.
    :raises InvalidArgument: naming the argument, its value and what is allowed.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        allowed = f"a list of numbers from {low} to {high}"
        raise kernel_error(-22, f"{name}: {shown(values)}; allowed: {allowed}")
    return frozenset(check_number(name, value, low, high) for value in values)


def check_text(name: str, value: object) -> str:
    """Return an argument that has to be text.

    :raises InvalidArgument: naming the argument and its value.
    """
    if not isinstance(value, str):
        raise kernel_error(-22, f"{name}: {shown(value)}; allowed: text")
    return value


class failing_with:
    """Give a refusal the kernel's word for what went wrong (pr_debug of offline_pages)."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __enter__(self) -> None:
        """Nothing: only a refusal matters."""

    def __exit__(self, kind: object, e: BaseException | None, where: object) -> None:
        """Name what a refusal failed with, unless something inside has."""
        if isinstance(e, KernelError):
            e.reason = e.reason or self.reason
