"""Failures to order, for those who test what their program does about them.

An order is a line of words, so that a control file can take it as well as Python:
``busy 33``, ``veto MEM_GOING_ONLINE ENOMEM 32``, ``fail __add_pages ENOMEM 2``, ``forget``.
Scenarios have a step for each of these.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kmm.errors import ConfigError, kernel_error, shown
from kmm.memory_block import (
    ACTION_NAMES,
    MEM_GOING_OFFLINE,
    MemoryNotifier,
    MemoryNotify,
    register_memory_notifier,
    unregister_memory_notifier,
)
from kmm.notifiers import INJECTABLE
from kmm.trace import FALLIBLE, NTH_MAX

if TYPE_CHECKING:
    from kmm.machine import Machine

#: The operations of a scenario's steps that order.
ORDERS = ("busy", "veto", "fail", "forget")
#: The errnos that this host has names for.
ERRNOS = frozenset(errno.errorcode.values())
_GIVEN = "allowed: busy BLOCK, veto EVENT ERRNO [BLOCK], fail FUNCTION ERRNO [NTH], forget"


class FailureOrders:
    """What a machine has been told to fail at.

    :param m: the machine; its notifier chain has one more member until :meth:`forget`.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self._vetoes: dict[tuple[str, int | None], int] = {}
        self._notifier = MemoryNotifier("ordered failure", self._answer, asks=self._would_answer)
        self._listening = False

    def busy(self, block_id: int) -> None:
        """Have every attempt to take a block offline end with EBUSY.

        :param block_id: the number in the name of a block that is there.
        :raises ConfigError: naming the value and what is allowed.
        """
        if block_id not in self.m.memory_blocks:
            raise ConfigError(f"block_id: {block_id}; allowed: those of blocks that are there")
        self.veto("MEM_GOING_OFFLINE", errno.EBUSY, block_id)

    def veto(self, event: str, code: int, block_id: int | None = None) -> None:
        """Have a notifier refuse an event.

        :param event: MEM_GOING_ONLINE or MEM_GOING_OFFLINE; code: the errno, positive.
        :param block_id: of which block; of all if None.
        :raises ConfigError: naming the value and what is allowed.
        """
        if event not in INJECTABLE:
            raise ConfigError(f"event: {shown(event)}; allowed: {', '.join(INJECTABLE)}")
        if block_id is not None and block_id < 0:
            raise ConfigError(f"block_id: {block_id}; allowed: numbers from 0")
        self._vetoes[event, block_id] = -_checked(code)
        if not self._listening:
            register_memory_notifier(self.m, self._notifier)
            self._listening = True

    def fail(self, function: str, code: int, nth: int = 1) -> None:
        """Have the nth next call of a kernel function fail, once.

        :param function: one of ``kmm.trace.FALLIBLE``; code: the errno, positive.
        :raises ConfigError: naming the value and what is allowed.
        """
        if function not in FALLIBLE:
            allowed = ", ".join(sorted(FALLIBLE))
            raise ConfigError(f"function: {shown(function)}; allowed: {allowed}")
        if not 1 <= nth <= NTH_MAX:
            raise ConfigError(f"nth: {nth}; allowed: 1 to {NTH_MAX}")
        probes = self.m.kprobes or self.m.trace(recording=False)
        probes.fail(function, -_checked(code), nth)

    def forget(self) -> None:
        """Withdraw all orders."""
        self._vetoes.clear()
        if self._listening:
            unregister_memory_notifier(self.m, self._notifier)
            self._listening = False
        if self.m.kprobes is not None:
            self.m.kprobes.forget()

    def pending(self) -> list[str]:
        """Return what is ordered and has not come to pass, in words."""
        vetoes = [
            f"veto {event} {errno.errorcode[-code]}" + ("" if block is None else f" {block}")
            for (event, block), code in self._vetoes.items()
        ]
        probes = self.m.kprobes
        return vetoes + [f"fail {name}" for name in (probes.pending() if probes else [])]

    def play(self, step: Mapping[str, Any]) -> str:
        """Take the order of a scenario's step; return in words what is ordered now, or was.

        :param step: checked by schema.check_step, its op one of ORDERS.
        :raises NoSuchDevice: if a block that is to be busy is not there.
        """
        op = step["op"]
        if op == "forget":
            were = self.pending()
            self.forget()
            return f"withdrawn: {', '.join(were)}" if were else "nothing was ordered"
        if op == "busy":
            if step["block"] not in self.m.memory_blocks:
                raise kernel_error(-errno.ENODEV, f"block: {step['block']}; it is not there")
            self.busy(step["block"])
        elif op == "veto":
            self.veto(step["event"], errno_of(step["errno"]), step.get("block"))
        else:
            self.fail(step["function"], errno_of(step["errno"]), step.get("nth", 1))
        return f"ordered: {', '.join(self.pending())}"

    def order(self, line: str) -> None:
        """Take an order in words.

        :raises ConfigError: naming what is wrong with it and what is allowed.
        """
        words = line.split()
        match words:
            case ["busy", block]:
                self.busy(_number("BLOCK", block))
            case ["veto", event, code]:
                self.veto(event, errno_of(code))
            case ["veto", event, code, block]:
                self.veto(event, errno_of(code), _number("BLOCK", block))
            case ["fail", function, code]:
                self.fail(function, errno_of(code))
            case ["fail", function, code, nth]:
                self.fail(function, errno_of(code), _number("NTH", nth))
            case ["forget"]:
                self.forget()
            case _:
                raise ConfigError(f"order: {shown(line)}; {_GIVEN}")

    def _answer(self, m: Machine, action: int, arg: MemoryNotify) -> int:
        return self._code(ACTION_NAMES[action], arg)

    def _would_answer(self, m: Machine, arg: MemoryNotify) -> int:
        return self._code(ACTION_NAMES[MEM_GOING_OFFLINE], arg)

    def _code(self, event: str, arg: MemoryNotify) -> int:
        block_id = arg.start_pfn // self.m.block_pages
        return self._vetoes.get((event, block_id)) or self._vetoes.get((event, None), 0)


def errno_of(word: str) -> int:
    """Return the number of an errno's name, such as EBUSY.

    :raises ConfigError: if there is none of that name.
    """
    code = getattr(errno, word, None) if word.startswith("E") else None
    if not isinstance(code, int):
        raise ConfigError(f"ERRNO: {shown(word)}; allowed: names such as EBUSY, ENOMEM, EIO")
    return code


def _checked(code: int) -> int:
    if code not in errno.errorcode:
        raise ConfigError(f"code: {code}; allowed: an errno of errno.errorcode, positive")
    return code


def _number(name: str, word: str) -> int:
    text = word.removeprefix("memory")
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ConfigError(f"{name}: {shown(word)}; allowed: a number")
    return int(text)
