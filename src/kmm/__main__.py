"""``python -m kmm``: the ``kmm`` command."""

from kmm.cli import main

if __name__ == "__main__":
    main(prog_name="kmm")
