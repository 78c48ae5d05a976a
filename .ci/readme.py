"""Runs every shell command of a Markdown file, in order; stops at the first that fails."""

import re
import subprocess
import sys
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
if not blocks:
    sys.exit(f"{sys.argv[1]}: no ```sh block")
for block in blocks:
    print(f"$ {block.strip()}", flush=True)
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=True)
