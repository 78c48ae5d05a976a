"""``kmm completion``: what a shell needs to complete kmm's commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion of SHELL, for its start-up file.

    \b
    Example: kmm completion bash >> ~/.bashrc
    """
    found = get_completion_class(shell)
    assert found is not None  # the three are click's own
    click.echo(found(ctx.find_root().command, {}, "kmm", "_KMM_COMPLETE").source())
