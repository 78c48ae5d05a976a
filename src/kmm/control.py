"""The control directory of a mounted machine: what no kernel has a file for.

Its files are named after those of the kernel that come closest: ``kmsg`` and ``uevents`` end where
the news end, ``kmsg_pipe`` and ``uevents_pipe`` wait for more, as ``trace`` and ``trace_pipe`` do.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from kmm.errors import ConfigError, KernelError, ValidationError, kernel_error
from kmm.scenario import Outcome, Player, describe
from kmm.schema import check_step
from kmm.tree import DIRECTORY, Attr, Lines, Tree

CONTROL = "/.kmm"


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A file: what reading gives, what a write does; a pipe has lines instead."""

    read: Callable[[], str] | None = None
    write: Callable[[str], None] | None = None
    pipe: Lines | None = None

    @property
    def mode(self) -> int:
        """Kind and permission bits."""
        readable = self.read is not None or self.pipe is not None
        return stat.S_IFREG | 0o444 * readable | 0o200 * (self.write is not None)


class Control:
    """The control directory of one machine.

    :param tree: its files; player: who plays steps on it, of a scenario or of nothing.
    :param played: how many steps of the player's scenario were played already.
    """

    def __init__(self, tree: Tree, player: Player, played: int = 0) -> None:
        self.tree, self.player, self.played = tree, player, played
        self.outcomes: list[Outcome] = []
        self.orders = player.orders
        self.files = {
            "fail": ControlFile(self._pending, self.orders.order),
            "kmsg": ControlFile(lambda: _text(tree.log)),
            "kmsg_pipe": ControlFile(pipe=tree.log),
            "next": ControlFile(self._coming, self._next),
            "outcome": ControlFile(self._outcome),
            "plug": ControlFile(write=self._plug),
            "status": ControlFile(self._status),
            "step": ControlFile(write=self._step),
            "uevents": ControlFile(lambda: _text(tree.uevents)),
            "uevents_pipe": ControlFile(pipe=tree.uevents),
            "unplug": ControlFile(write=self._unplug),
            "validate": ControlFile(self._validate),
        }

    def file(self, path: str) -> ControlFile:
        """Return the file at a path.

        :raises NoSuchFile, IsADirectory: if there is none.
        """
        if path == CONTROL:
            raise kernel_error(-errno.EISDIR, path)
        found = self.files.get(path.removeprefix(f"{CONTROL}/"))
        if found is None:
            raise kernel_error(-errno.ENOENT, path)
        return found

    def attr(self, path: str) -> Attr:
        """Return what stat(2) tells of the directory or a file in it.

        :raises NoSuchFile: if it is neither.
        """
        return Attr(DIRECTORY, 0) if path == CONTROL else Attr(self.file(path).mode, 0)

    def listdir(self, path: str) -> list[tuple[str, int]]:
        """Return the names in the directory and their kinds."""
        if path != CONTROL:
            self.file(path)
            raise kernel_error(-errno.ENOTDIR, path)
        return [(name, stat.S_IFREG) for name in self.files]

    def open(self, path: str, flags: int) -> ControlOpenFile | Pipe:
        """Open a file; ``flags`` as open(2) has them.

        :raises NoSuchFile, IsADirectory: if there is none; AccessDenied: if it is not for that.
        """
        file, access = self.file(path), flags & os.O_ACCMODE
        if access != os.O_WRONLY and not file.mode & 0o400:
            raise kernel_error(-errno.EACCES, f"{path} is write-only")
        if access != os.O_RDONLY and file.write is None:
            raise kernel_error(-errno.EACCES, f"{path} is read-only")
        if file.pipe is not None:
            return Pipe(self, file.pipe)
        return ControlOpenFile(self, file)

    # -- what the files do ------------------------------------------------------------

    def _play(self, steps: list[dict[str, object]]) -> None:
        self.outcomes = []
        for step in steps:
            out = self.player.play(step)
            self.outcomes.append(out)
            if out.errno:
                raise kernel_error(-out.errno, out.error)
            if out.output in ("_OST 0x80", "_OST 0x82"):
                raise kernel_error(-errno.EBUSY, f"{out.text}: {out.output}")

    def _plug(self, text: str) -> None:
        words = text.split()
        if len(words) != 4:
            raise ConfigError(f"plug: {text!r}; allowed: ID NODE ADDRESS SIZE")
        dimm, node, addr, size = words
        if not node.isascii() or not node.isdigit() or len(node) > 9:
            raise ConfigError(f"plug: node {node!r}; allowed: a number")
        step = {"op": "plug", "id": dimm, "node": int(node), "addr": addr, "size": size}
        self._play([check_step(step, "plug")])

    def _unplug(self, text: str) -> None:
        self._play([check_step({"op": "unplug", "id": text.strip()}, "unplug")])

    def _step(self, text: str) -> None:
        try:
            step = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"step: read as JSON: {e}") from None
        self._play([check_step(step, "step")])

    def _next(self, text: str) -> None:
        """Play the next steps of the scenario; a refused one is passed, as ``kmm run`` does."""
        word = text.strip() or "1"
        if not word.isascii() or not word.isdigit() or len(word) > 9:
            raise ConfigError(f"next: {text!r}; allowed: a number of steps")
        left = list(self.player.scenario.steps[self.played :])
        if not left and int(word):
            raise kernel_error(-errno.ENODATA, "next: every step was played")
        self.outcomes = outcomes = []
        for step in left[: int(word)]:
            outcomes.append(self.player.play(step))
            self.played += 1

    def _coming(self) -> str:
        steps = self.player.scenario.steps[self.played :]
        at = self.played + 1
        return "".join(f"step {i}: {describe(step)}\n" for i, step in enumerate(steps, at))

    def _pending(self) -> str:
        return "".join(f"{line}\n" for line in self.orders.pending())

    def _outcome(self) -> str:
        lines = []
        for out in self.outcomes:
            lines += [out.text, *f"refused: {out.error}".split("\n")] if out.error else [out.text]
            lines += out.output.split("\n") if out.output else []
            lines += [f"uevent {line}" for line in out.uevents]
            lines += [f"kernel {line}" for line in out.log]
        return "".join(f"{line}\n" for line in lines)

    def _status(self) -> str:
        m = self.player.m
        said = {
            "pid": os.getpid(),
            "blocks": len(m.memory_blocks),
            "dimms": sorted(m.dimms),
            "nodes": sorted(m.node_devices),
            "played": self.played,
            "steps": len(self.player.scenario.steps),
        }
        return json.dumps(said) + "\n"

    def _validate(self) -> str:
        try:
            self.player.m.validate()
        except ValidationError as e:
            return f"{e}\n"
        return "ok\n"


class ControlOpenFile:
    """An open control file; its text is made at its start."""

    def __init__(self, control: Control, file: ControlFile) -> None:
        self.control, self.file = control, file
        self.text: bytes | None = None

    def read(self, size: int, offset: int) -> bytes:
        """Return at most ``size`` bytes from ``offset`` on."""
        if offset == 0 or self.text is None:
            with self.control.tree.lock:
                self.text = self.file.read().encode(errors="replace") if self.file.read else b""
        return self.text[offset : offset + size]

    def write(self, data: bytes, offset: int) -> int:
        """Do what a line says, with all that one write(2) brings.

        :raises KernelError: EINVAL for what is not understood, or what was refused with.
        """
        if self.file.write is None:
            raise kernel_error(-errno.EINVAL, "read-only")
        with self.control.tree.lock:
            self.control.outcomes = []
            try:
                self.file.write(data.decode(errors="replace"))
            except ConfigError as e:
                self.control.outcomes = [Outcome("nothing", str(e), errno.EINVAL)]
                raise kernel_error(-errno.EINVAL, str(e)) from None
            except KernelError as e:
                # A step that was played has told already what it met.
                if not self.control.outcomes:
                    self.control.outcomes.append(Outcome("nothing", str(e), e.errno or 0))
                raise
            finally:
                self.control.tree.happened()
        return len(data)


class Pipe:
    """Lines from the oldest that is kept on, as they come; each opener has all of them."""

    def __init__(self, control: Control, lines: Lines) -> None:
        self.control, self.lines = control, lines
        self.number = 0
        self.rest = b""

    def read(self, size: int, offset: int) -> bytes | None:
        """Return what has come, at most ``size`` bytes; None if its reader has to wait."""
        with self.control.tree.lock:
            if not self.rest and not self._take():
                return None
            out, self.rest = self.rest[:size], self.rest[size:]
            return out

    def _take(self) -> bool:
        lines, self.number = self.lines.after(self.number), self.lines.end
        self.rest = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        return bool(self.rest)

    def write(self, data: bytes, offset: int) -> int:
        """Refuse.

        :raises InvalidArgument: always.
        """
        raise kernel_error(-errno.EINVAL, "read-only")


def _text(lines: Lines) -> str:
    return "".join(f"{line}\n" for line in lines.after(0))
