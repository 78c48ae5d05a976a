"""Takes the documentation's picture of a report: ``python .ci/report_picture.py docs/report.png``.

The report is that of ``kmm demo`` at the step where both blocks are
online, in light colours.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from click.testing import CliRunner

from kmm.cli import main
from tests.chromium import browser

STEP = 3

with tempfile.TemporaryDirectory() as work:
    report = Path(work) / "report.html"
    said = CliRunner().invoke(main, ["report", "demo", "-o", str(report)])
    if said.exit_code:
        sys.exit(said.output)
    with browser() as b:
        b.scheme("light")
        b.size(1280, 1000)
        print(f"the report of kmm demo opened in {b.open(report):.2f} s")
        b.run(
            f"{{const s = document.getElementById('slider'); s.value = {STEP};"
            "s.dispatchEvent(new Event('input')); scrollTo(0, 0);}"
        )
        # The first chart is in the picture.
        b.wait("document.querySelector('#marks canvas') !== null")
        b.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        b.screenshot(Path(sys.argv[1]))
        if b.errors:
            sys.exit("\n".join(b.errors))
