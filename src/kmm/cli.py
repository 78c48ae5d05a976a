"""The ``kmm`` command."""

from __future__ import annotations

import sys

try:
    import click
except ImportError:  # pragma: no cover - depends on how kmm was installed
    sys.exit("kmm: the command line needs click; install kmm[cli]")

from kmm.cli_frame import Group

#: Where each command is.
COMMANDS = {
    "completion": ("kmm.cli_completion", "completion"),
    "demo": ("kmm.cli_run", "demo"),
    "export": ("kmm.cli_export", "export"),
    "import": ("kmm.cli_import", "import_"),
    "mount": ("kmm.cli_mount", "mount"),
    "replay": ("kmm.cli_verify", "replay"),
    "report": ("kmm.cli_report", "report"),
    "run": ("kmm.cli_run", "run"),
    "shell": ("kmm.cli_mount", "shell_command"),
    "stress": ("kmm.cli_stress", "stress"),
    "trace": ("kmm.cli_trace", "trace"),
    "verify": ("kmm.cli_verify", "verify"),
    "why": ("kmm.cli_why", "why"),
}


@click.group(cls=Group, lazy=COMMANDS)
@click.version_option(package_name="kmm")
def main() -> None:
    """A machine you can plug memory into, true to Linux 6.1.

    \b
    Example: kmm demo
    """


if __name__ == "__main__":
    main()
