"""Starts the ``kmm`` command.

It stands beside the package: while that is imported, Ctrl-C ends the process without a traceback.
"""

# What the module signal wraps: that one takes long enough to import to be interrupted.
import _signal  # type: ignore[import-not-found]


def main() -> None:
    """Run the command."""
    before = _signal.getsignal(_signal.SIGINT)
    if before is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    # Whoever starts this as a part of a command lets it begin with SIGINT blocked.
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])
    from kmm.cli import main as command

    _signal.signal(_signal.SIGINT, before)
    command(prog_name="kmm")


if __name__ == "__main__":
    main()
