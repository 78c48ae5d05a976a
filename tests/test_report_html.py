"""The report's page, opened in Chromium: it loads, the slider moves the map, nothing breaks it."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kmm.cli import main
from kmm.report_data import check_run
from kmm.report_html import cache_directory, charting_library, in_script, report_html
from tests.chromium import Browser, browser, need_chromium
from tests.test_report_data import record
from tests.test_trace_graph import demo

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='x'\">"
EXAMPLES = Path(__file__).parent.parent / "examples"


def kmm(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The charting library is kept there, not at home."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return record(demo())[0]


@pytest.fixture(scope="module")
def library() -> str:
    pytest.importorskip("vl_convert")
    return charting_library()


@pytest.fixture(scope="module")
def page(run: dict[str, Any], library: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_html(run, library))
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    need_chromium()
    with browser() as b:
        b.size(1200, 900)
        yield b


def go(b: Browser, moment: int) -> None:
    b.run(
        f"{{const s = document.getElementById('slider'); s.value = {moment};"
        "s.dispatchEvent(new Event('input'));}"
    )


def text(b: Browser, selector: str) -> str:
    return str(b.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def pictures(b: Browser) -> list[str]:
    script = "[...document.querySelectorAll('#grid canvas')].map((c) => c.toDataURL())"
    out: list[str] = b.run(script)
    return out


def test_it_loads_and_draws_without_errors_or_requests(chromium: Browser, page: Path) -> None:
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(page)
    for chart in ("marks", "heat", "counts"):
        chromium.run(f"document.getElementById('{chart}').scrollIntoView()")
        chromium.wait(f"document.querySelector('#{chart} canvas') !== null")
    for details in ("ranges", "marks-table", "heat-table"):
        chromium.run(f"document.getElementById('{details}').open = true")
        chromium.wait(f"document.querySelector('#{details} td') !== null")
    assert chromium.errors == []
    assert {url.partition(":")[0] for url in chromium.requests} <= {"file", "data", "blob", "about"}
    assert sum(url.startswith("file:") for url in chromium.requests) == 1


def test_the_slider_changes_the_map_by_keyboard_too(
    chromium: Browser, page: Path, run: dict[str, Any]
) -> None:
    chromium.open(page)
    seen = []
    chromium.run("document.getElementById('slider').focus()")
    for number in range(len(run["steps"]) + 1):
        assert text(chromium, "#now").startswith(str(number))
        assert chromium.run("document.getElementById('slider').getAttribute('aria-valuetext')")
        seen.append((tuple(pictures(chromium)), text(chromium, "#legend tbody")))
        chromium.key("ArrowRight")
    assert len({picture for picture, _ in seen}) >= 5
    assert "Movable" not in seen[1][1]
    assert "Movable" in seen[2][1]
    chromium.key("Home")
    assert text(chromium, "#now") == "0: as booted"
    assert pictures(chromium) == list(seen[0][0])


def test_its_tables_say_what_happened(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    go(chromium, 6)
    assert "refused: EBUSY" in text(chromium, "#step")
    offline = text(chromium, "#offline")
    assert "32,765 free, 3 stayed" in offline
    assert "pfn 0x108000" in offline
    assert "memory32 to 33" in offline
    chromium.run(
        "{const f = document.getElementById('filter'); f.value = 'node1';"
        "f.dispatchEvent(new Event('input'));}"
    )
    assert "add /devices/system/node/node1 node" in text(chromium, "#events")
    assert "memory32" not in text(chromium, "#events")
    chromium.run("document.getElementById('ranges').open = true")
    chromium.wait("document.querySelector('#ranges td') !== null")
    assert "memory1 to 7" in text(chromium, "#ranges")
    row = "document.querySelector('#steps tbody tr').cells"
    assert chromium.run(f"[...{row}].map((c) => c.textContent)")[3:5] == ["5", "3"]


def test_calls_unfold(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert "acpi_device_hotplug" not in text(chromium, "#calls")
    for _ in range(12):
        chromium.run(
            "document.querySelectorAll('#calls details').forEach((d) => { d.open = true; })"
        )
        chromium.run("new Promise((done) => setTimeout(done, 30))")
    calls = text(chromium, "#calls")
    assert "sparse_add_section() ×4" in calls
    assert "generic_online_page() ×32" in calls


def test_blocks_are_named_by_arrow_keys(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    go(chromium, 3)
    chromium.run("document.querySelectorAll('#grid canvas')[1].focus()")
    chromium.key("ArrowRight")
    assert text(chromium, "#picked") == "memory32 at 0x100000000: online, zone Movable, node 1"
    chromium.key("ArrowRight")
    assert "memory33 at 0x108000000: online, zone Normal, node 1" in text(chromium, "#picked")
    go(chromium, 2)
    assert "memory33 at 0x108000000: offline, no zone, node 1" in text(chromium, "#picked")
    chromium.key("End")
    assert text(chromium, "#picked").startswith("memory35 ")


def test_light_dark_and_narrow(chromium: Browser, page: Path) -> None:
    script = "getComputedStyle(document.body).backgroundColor"
    grounds = {}
    for scheme in ("light", "dark"):
        chromium.scheme(scheme)
        chromium.open(page)
        grounds[scheme] = chromium.run(script)
    assert grounds["light"] != grounds["dark"]
    chromium.run(
        "{const t = document.getElementById('theme'); t.value = 'light';"
        "t.dispatchEvent(new Event('change'));}"
    )
    assert chromium.run(script) == grounds["light"]
    chromium.scheme("light")
    chromium.size(380, 800)
    chromium.open(page)
    assert chromium.run("document.documentElement.scrollWidth") <= 380
    chromium.size(1200, 900)


WIDTHS = (1920, 1300, 800, 360)
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def draw_all(b: Browser) -> None:
    """Have all charts drawn and everything unfolded."""
    for chart in ("marks", "heat", "counts"):
        b.run(f"document.getElementById('{chart}').scrollIntoView()")
        b.wait(f"document.querySelector('#{chart} canvas') !== null")
    for _ in range(12):
        b.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        b.run("new Promise((done) => setTimeout(done, 30))")


@pytest.fixture(scope="module")
def long_words(run: dict[str, Any], library: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page in which every text is one long word."""
    word, wide = "a" * 900, copy.deepcopy(run)
    wide["title"] = word
    wide["steps"][0].update(text=word, output=word, log=[word], uevents=[word], error=word)
    wide["steps"][0]["calls"][0][0] = word
    wide["steps"][5]["offline"][0].update(error=word, reason=word, by=word)
    wide["legend"][0][1] = word
    for moment in wide["moments"]:
        moment["zones"][word] = moment["zones"]["node 0 DMA"]
    path = tmp_path_factory.mktemp("long") / "report.html"
    path.write_text(report_html(check_run(wide, "long"), library))
    return path


@pytest.mark.parametrize("which", ["page", "long_words"])
def test_nothing_is_wider_than_the_window(
    chromium: Browser, which: str, request: pytest.FixtureRequest
) -> None:
    chromium.size(WIDTHS[0], 900)
    chromium.open(request.getfixturevalue(which))
    draw_all(chromium)
    try:
        for width in WIDTHS:
            chromium.size(width, 900)  # the window gets narrower, then the charts
            chromium.wait(
                "[...document.querySelectorAll('.chart canvas')].every((c) =>"
                " c.clientWidth <= Math.max(320, c.closest('.chart').clientWidth))"
            )
            for moment in (0, 1, 6):
                go(chromium, moment)
                assert chromium.run(SIDEWAYS) <= 0, (width, moment)
    finally:
        chromium.size(1200, 900)


REACHABLE = """[...document.querySelectorAll(
  "a[href], button, input, select, summary, canvas, div, pre",
)].filter((e) => e.tabIndex >= 0 && e.checkVisibility())"""


def test_tab_reaches_everything_and_shows_where_it_is(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    go(chromium, 6)
    wanted = chromium.run(f"{{ window.all = {REACHABLE}; all.length; }}")
    assert wanted > 20
    seen = []
    for _ in range(wanted):
        chromium.key("Tab")
        seen.append(chromium.run("all.indexOf(document.activeElement)"))
        outline = chromium.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", chromium.run("document.activeElement.outerHTML.slice(0, 200)")
    assert seen == list(range(wanted))


def test_what_can_be_scrolled_can_be_reached_by_keyboard(chromium: Browser, page: Path) -> None:
    chromium.size(400, 800)
    chromium.open(page)
    draw_all(chromium)
    hidden = """[...document.querySelectorAll("main *")].filter((e) => e.tabIndex < 0 &&
      e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === "auto").map((e) => e.id)"""
    chromium.wait("document.querySelector('#steps').tabIndex === 0")
    assert chromium.run(hidden) == []
    chromium.size(1200, 900)


def test_nothing_moves_by_itself(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    draw_all(chromium)
    moving = """[...document.querySelectorAll("*")].filter((e) => { const s = getComputedStyle(e);
      return s.animationName !== "none" || /[1-9]/.test(s.transitionDuration) ||
      s.scrollBehavior !== "auto"; }).map((e) => e.tagName)"""
    assert chromium.run(moving) == []


def test_paper_is_light(chromium: Browser, page: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    chromium.scheme("dark")
    chromium.open(page)
    dark = chromium.run(ground)
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    assert chromium.run(ground) != dark
    chromium.run("dispatchEvent(new Event('afterprint'))")
    assert chromium.run(ground) == dark
    chromium.scheme("light")


CONTRAST = """(() => {
  const probe = document.createElement("span");
  document.body.append(probe);
  const light = (name) => {
    probe.style.color = `var(${name})`;
    const rgb = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
    const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const out = {};
  for (const ink of ["--ink", "--soft", "--bad"])
    out[ink] = Math.min(ratio(ink, "--card"), ratio(ink, "--bg"));
  for (const kind of ["z", "n"]) for (let i = 0; i < 6; i += 1)
    out[`--${kind}${i}`] = ratio(`--${kind}${i}`, "--letter");
  for (const ground of ["--cell", "--card"]) out[`on ${ground}`] = 1.5 * ratio("--hatch", ground);
  return out;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_letters_can_be_told_from_their_ground(
    chromium: Browser, page: Path, scheme: str
) -> None:
    chromium.scheme(scheme)
    chromium.open(page)
    assert {k: v for k, v in chromium.run(CONTRAST).items() if v < 4.5} == {}


def test_everything_has_a_name_for_a_screen_reader(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    tree = chromium.call("Accessibility.getFullAXTree")["nodes"]
    nameless = [
        node["role"]["value"]
        for node in tree
        if node.get("role", {}).get("value")
        in ("slider", "button", "combobox", "searchbox", "region", "application", "link")
        and not node.get("ignored")
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    assert sum(n.get("role", {}).get("value") == "slider" for n in tree) == 1


def test_what_looks_like_markup_is_text(
    chromium: Browser, run: dict[str, Any], library: str, tmp_path: Path
) -> None:
    evil = copy.deepcopy(run)
    evil["title"] = EVIL
    evil["steps"][0].update(text=EVIL, output=EVIL, log=[EVIL], uevents=[EVIL, "\u2028$title"])
    evil["steps"][0]["calls"][0][0] = EVIL
    evil["legend"][0][1] = EVIL
    for moment in evil["moments"]:
        moment["zones"][EVIL] = moment["zones"]["node 0 DMA"]
    path = tmp_path / "evil.html"
    path.write_text(report_html(check_run(evil, "evil"), library))
    chromium.errors.clear()
    chromium.open(path)
    go(chromium, 1)
    assert chromium.errors == []
    assert chromium.run("document.title") == EVIL
    assert text(chromium, "h1") == EVIL
    assert EVIL in text(chromium, "#step")
    assert chromium.run("document.querySelectorAll('img').length") == 0


def test_a_terabyte_is_a_small_page(chromium: Browser, library: str, tmp_path: Path) -> None:
    text_ = (EXAMPLES / "terabyte.toml").read_text()
    scenario = tmp_path / "terabyte.toml"
    scenario.write_text(re.sub(r"^block_size.*$", "", text_, flags=re.M))  # 8192 blocks
    path = tmp_path / "report.html"
    said = kmm("report", scenario, "-o", path, "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.output)["bytes"] == path.stat().st_size < 5_000_000
    chromium.errors.clear()
    chromium.open(path)
    go(chromium, 1)
    there = pictures(chromium)
    assert "8,192" in text(chromium, "#legend")
    go(chromium, 2)
    assert pictures(chromium) != there
    assert "memory8192 to 16383" in text(chromium, "#offline")
    assert chromium.errors == []


def test_a_saved_run_makes_the_same_page(tmp_path: Path, run: dict[str, Any]) -> None:
    pytest.importorskip("vl_convert")
    saved, a, b = (tmp_path / name for name in ("run.json", "a.html", "b.html"))
    assert kmm("demo", "--save", saved).exit_code == 0
    assert json.loads(saved.read_text()) == run
    assert kmm("report", saved, "-o", a).exit_code == 0
    assert kmm("report", "demo", "-o", b).exit_code == 0
    assert a.read_bytes() == b.read_bytes()


def test_saving_changes_nothing_that_is_printed(tmp_path: Path) -> None:
    path = EXAMPLES / "first_dimm.toml"
    plain = kmm("run", path)
    assert kmm("run", path, "--save", tmp_path / "run.json").output == plain.output
    assert kmm("run", path, "--save", tmp_path / "no" / "run.json").exit_code == 2


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert")
    bad = tmp_path / "run.json"
    bad.write_text('{"kmm_run": 2}')
    out = kmm("report", bad, "-o", tmp_path / "x.html")
    assert out.exit_code == 2
    assert "kmm_run: 2; allowed: 1" in out.output
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    out = kmm("report", "demo", "-o", tmp_path / "x.html")
    assert out.exit_code == 2
    assert "install kmm[report]" in out.output
    assert not (tmp_path / "x.html").exists()


def test_the_charting_library_is_kept_by_its_version(
    library: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = (cache / "kmm").iterdir()
    assert kept.name == f"vega-{version('vl-convert-python')}.js"
    assert kept.read_text() == library
    monkeypatch.setattr("kmm.report_html._bundle", lambda: pytest.fail("made again"))
    assert charting_library() == library


def test_without_a_place_to_keep_it_it_is_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vl_convert")
    monkeypatch.setattr("kmm.report_html._bundle", lambda: "made")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert charting_library() == "made"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "kmm"


#: What vl-convert is while it works, for longer than anybody waits: deaf to signals.
DEAF = """
import ctypes, os, pathlib
pathlib.Path(os.environ["BEGUN"]).write_text(str(os.getpid()))
def javascript_bundle(text): ctypes.PyDLL(None).sleep(600)
"""


def test_ctrl_c_does_not_wait_for_the_charting_library(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    (tmp_path / "vl_convert.py").write_text(DEAF)
    begun = tmp_path / "begun"
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    more = {"PYTHONPATH": paths, "BEGUN": str(begun), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "kmm", "report", "demo", "-o", str(tmp_path / "x.html")]
    with subprocess.Popen(
        command, env={**os.environ, **more}, stderr=subprocess.PIPE, text=True
    ) as report:
        while not begun.exists() or not begun.read_text():
            assert report.poll() is None
            time.sleep(0.02)
        report.send_signal(signal.SIGINT)
        _, said = report.communicate(timeout=60)
    assert report.returncode == 130
    assert said == "Error: interrupted before the first step\n"
    assert not Path(f"/proc/{begun.read_text()}").exists()
    assert not (tmp_path / "x.html").exists()
    assert not (tmp_path / "cache").exists()


def test_nothing_in_the_data_ends_the_script() -> None:
    data = {"x": "</script><!--<script>&\u2028\u2029"}
    inside = in_script(json.dumps(data, ensure_ascii=False))
    assert not set("<>&\u2028\u2029") & set(inside)
    assert json.loads(inside) == data
