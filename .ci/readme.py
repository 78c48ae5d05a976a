"""Runs the shell commands of a Markdown file, in order; stops at the first that fails.

``readme.py FILE [BLOCKS]``, where BLOCKS is a slice of its blocks such as ``:2``.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
first, _, end = (sys.argv[2] if len(sys.argv) > 2 else ":").partition(":")
blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)[
    int(first or 0) : int(end) if end else None
]
if not blocks:
    sys.exit(f"{sys.argv[1]}: no such ```sh block")
start = time.monotonic()
for block in blocks:
    print(f"{time.monotonic() - start:.0f} s $ {block.strip()}", flush=True)
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=True)
