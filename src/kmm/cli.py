"""The ``kmm`` command."""

from __future__ import annotations

import sys

try:
    import click
except ImportError:  # pragma: no cover - depends on how kmm was installed
    sys.exit("kmm: the command line needs click; install kmm[cli]")

from kmm.cli_completion import completion
from kmm.cli_export import export
from kmm.cli_frame import Group
from kmm.cli_import import import_
from kmm.cli_mount import mount, shell_command
from kmm.cli_report import report
from kmm.cli_run import demo, run
from kmm.cli_stress import stress
from kmm.cli_trace import trace
from kmm.cli_verify import replay, verify
from kmm.cli_why import why


@click.group(cls=Group)
@click.version_option(package_name="kmm")
def main() -> None:
    """A machine you can plug memory into, true to Linux 6.1.

    \b
    Example: kmm demo
    """


for _command in (
    completion,
    demo,
    export,
    import_,
    mount,
    replay,
    report,
    run,
    shell_command,
    stress,
    trace,
    verify,
    why,
):
    main.add_command(_command)

if __name__ == "__main__":
    main()
