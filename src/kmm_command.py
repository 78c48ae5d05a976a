"""Starts the ``kmm`` command.

It stands beside the package: while that is imported, Ctrl-C ends the process without a traceback.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kmm.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()
