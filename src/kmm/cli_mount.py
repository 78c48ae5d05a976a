"""``kmm mount`` and ``kmm shell``: programs read and write a machine's files."""

from __future__ import annotations

import json
import os
import signal

import click

from kmm.cli_frame import machine_options
from kmm.control import CONTROL
from kmm.errors import printable
from kmm.machine_source import chosen_player
from kmm.mount import MountError, serve, start
from kmm.namespace import CommandError, run_inside, shell, shell_over


def _refused(error: MountError) -> click.ClickException:
    return click.ClickException(printable(str(error)))


@click.command()
@click.argument("directory", type=click.Path())
@machine_options
@click.option(
    "--background", is_flag=True, help="Return once it answers, and print the server's process id."
)
@click.option("--json", "as_json", is_flag=True, help="Say that it is mounted as JSON, in a line.")
def mount(
    directory: str,
    scenario: str | None,
    source: str | None,
    steps: int | None,
    background: bool,
    as_json: bool,
) -> None:
    """Serve a machine's /proc and /sys below DIRECTORY until it is unmounted, or Ctrl-C.

    Its directory .kmm plugs and unplugs DIMMs, plays the scenario's next steps, tells the kernel
    log and uevents.  With --json, the line that says that it is mounted is an object with its path,
    the server's process id (pid), that directory (control), and how many steps were played of how
    many.  Exits with 1 if it cannot be mounted.

    \b
    Example: kmm mount --scenario examples/first_dimm.toml --steps 2 --background /mnt
    """
    player, played = chosen_player(scenario, source, steps)

    def mounted(pid: int, words: object) -> None:
        if as_json:
            where = os.path.abspath(directory)
            said = {"path": where, "pid": pid, "control": where + CONTROL}
            words = json.dumps(said | {"played": played, "steps": len(player.scenario.steps)})
        click.echo(words)

    try:
        if background:
            pid = start(directory, player, played, orphan=True)
            # It is mounted: what comes now can neither be said to have failed nor take that back.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            mounted(pid, pid)
            return
        words = f"{printable(directory)}: mounted; umount or Ctrl-C ends it"
        serve(directory, player, played, lambda: mounted(os.getpid(), words))
    except MountError as e:
        raise _refused(e) from None


@click.command("shell", context_settings={"ignore_unknown_options": True})
@machine_options
@click.option("--mounted", type=click.Path(file_okay=False), help="A machine mounted there.")
@click.option("--outside", hidden=True)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def shell_command(
    scenario: str | None,
    source: str | None,
    steps: int | None,
    mounted: str | None,
    outside: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND where a machine's files lie over this host's /proc and /sys.

    Only COMMAND and what it starts see them, with KMM=1 in the environment, and in KMM_DIR a
    directory with all of the machine's files and .kmm.  Whoever is not root needs user namespaces,
    and is root in there.

    Exits as COMMAND does, with 128 and the number of a signal that ended it; with 127 if there is
    no such command, with 126 if it cannot be executed; with 1 if it was not started because it
    could have reached the host's files.

    \b
    Example: kmm shell --scenario examples/first_dimm.toml -- lsmem
    """
    given: dict[str, object] = {"--scenario": scenario, "--from": source, "--steps": steps}
    if mounted is not None and any(value is not None for value in given.values()):
        raise click.UsageError("--mounted stands alone; allowed: one machine")
    try:
        if outside is None:
            given["--mounted"] = mounted
            options = [f"{name}={value}" for name, value in given.items() if value is not None]
            status = run_inside([*options, "--", *command])
        elif mounted is not None:
            status = shell_over(mounted, command, outside)
        else:
            player, played = chosen_player(scenario, source, steps)
            status = shell(player, played, command, outside, os.environ["KMM_DIR"])
    except CommandError as e:
        click.echo(f"Error: {printable(str(e))}", err=True)
        status = e.status
    except MountError as e:
        raise _refused(e) from None
    raise SystemExit(status)
