"""What all commands share: output, errors as one line, progress bars, the end by Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import click

from kmm.errors import ConfigError, ImpossibleState, KernelError, ValidationError, printable

P = ParamSpec("P")
R = TypeVar("R")

#: As a shell has it of a program that SIGINT ended.
INTERRUPTED = 130
#: Seconds that the engine has to come back from what it is doing when Ctrl-C is pressed.
PATIENCE = 0.5
#: Seconds that a command may take before it shows a progress bar.
BAR_AFTER = 2.0

_MACHINE_OPTIONS = (
    click.option(
        "--scenario", type=click.Path(dir_okay=False), help="Play this scenario (or demo) first."
    ),
    click.option(
        "--from",
        "source",
        type=click.Path(),
        help="What kmm import takes or has written (/ is this machine), or a recording.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=0),
        help="How many steps to play: of a scenario all by default, of a recording none.",
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options ``--scenario``, ``--from`` and ``--steps``."""
    for option in reversed(_MACHINE_OPTIONS):
        command = option(command)
    return command


def echo(text: str) -> None:
    """Print a line, whatever is in it."""
    click.echo(printable(text))


def echo_json(data: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(data, indent=1))


class OutFile(click.Path):
    """A file to write: that there can be none is said before a long run, not after it."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """Return the path.

        :raises ConfigError: if its directory is not there, or it cannot be written.
        """
        out = super().convert(value, param, ctx)
        place = Path(os.fsdecode(out))
        try:
            found = place if place.exists() else place.parent
            there = found == place or found.is_dir()
        except OSError as e:  # such as a name that is too long
            raise ConfigError(f"{place}: {e.strerror}") from None
        if not there or not os.access(found, os.W_OK):
            code = errno.EACCES if there else errno.ENOENT
            raise ConfigError(f"{place}: {os.strerror(code)}")
        return out


def write_text(path: str, text: str) -> None:
    """Write a file.

    :raises ConfigError: if there can be none of that name; click.ClickException: if the host fails
        to hold it, as a full disk does.
    """
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        said = f"{path}: {e.strerror}"
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        raise (fail(said) if full else ConfigError(said)) from None


def fail(error: Exception | str) -> click.ClickException:
    """Return what ends a command with one line and status 1."""
    return click.ClickException(printable(str(error)))


class _Interrupted(click.ClickException):
    exit_code = INTERRUPTED


class Group(click.Group):
    """Turns kmm's own errors into one line and exit status 2, lost output into status 1.

    An interrupted command ends with a line and status 130.

    :param lazy: by name, the module that has the command and what it is called there; it is
        imported when somebody asks for the command, as all of them would take half a second.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*self.lazy, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; None if there is none of that name."""
        if cmd_name in self.lazy and cmd_name not in self.commands:
            module, name = self.lazy[cmd_name]
            try:
                self.add_command(cast(click.Command, getattr(import_module(module), name)))
            except KeyboardInterrupt:
                raise _Interrupted("interrupted") from None
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with; what is none is told what is alike."""
        if args and args[0] not in self.list_commands(ctx):
            for name in self.lazy:
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and see that all output was written."""
        # Python has None for a stream that was closed from the start.
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as e:
            if isinstance(e, KernelError):
                raise
            # What is left in the buffer has to go somewhere when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if e.errno != errno.EPIPE:
                click.echo(f"Error: standard output: {e.strerror}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            raise _Interrupted(printable(f"interrupted {' '.join(e.args)}".strip())) from None
        except ConfigError as e:
            raise click.UsageError(printable(str(e))) from None
        except (ValidationError, ImpossibleState) as e:
            raise fail(e) from None
        except MemoryError as e:
            raise click.ClickException(str(e) or "this host has not enough memory") from None


class Watch:
    """Knows where a command is, shows it as a bar, and ends the process if Ctrl-C is not heard.

    The engine works without Python, for seconds on a large machine: a thread waits for the signal
    beside it.  Where the command comes back in time it ends by itself.
    """

    def __init__(self) -> None:
        self.where = ""
        self._over = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Listen for Ctrl-C while the body runs."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        listener.start()
        try:
            yield self
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(*(e.args or (self.where,))) from None
        finally:
            self._over.set()
            signal.set_wakeup_fd(before)
            os.close(write)  # which ends the listener
            listener.join()
            os.close(read)

    def _listen(self, read: int) -> None:
        while data := os.read(read, 64):
            if signal.SIGINT in data and not self._over.wait(PATIENCE):
                message = f"Error: interrupted {self.where}".strip()
                os.write(2, f"{printable(message)}\n".encode())
                os._exit(INTERRUPTED)

    @contextlib.contextmanager
    def bar(self, total: int, what: str) -> Iterator[Callable[[int, str], None]]:
        """Show a bar on a terminal if the body takes longer than two seconds.

        :param total: how many of them there are; what: their name, such as ``step``.
        :return: a function that is told how many are done, and in words which is next.
        """
        # Imported here: it takes longer than a short command does.
        from tqdm import tqdm

        quiet = not sys.stderr.isatty()
        with tqdm(
            total=total, desc=what, delay=BAR_AFTER, disable=quiet, leave=False, file=sys.stderr
        ) as line:

            def done(number: int, words: str = "") -> None:
                self.where = f"after {what} {number} of {total}" + (f", in {words}" * bool(words))
                line.update(number - line.n)

            done(0)
            yield done


def interruptible(fn: Callable[Concatenate[Watch, P], R]) -> Callable[P, R]:
    """Give a command a Watch, and have Ctrl-C end it within a second, with a word of where."""

    @wraps(fn)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        with Watch().watching() as watch:
            return fn(watch, *args, **kwargs)

    return command
