"""docs/slots.html shows what `BatchShape` does.

| section | what is checked |
| --- | --- |
| the record | the page holds what `export.py` records; both shapes reject the same events |
| in a browser | after any events the page shows BatchShape's rows, and the tokens that moves copy |
| buttons | clicks do what the events in the address do |
"""

import html
import importlib.util
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from baton_kernels import BatchShape

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"ragged": False, "aligned": True}
BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium or google-chrome: `apt-get install chromium`"
)


@pytest.fixture(scope="module")
def export():
    path = ROOT / "scripts" / "slots_page" / "export.py"
    spec = importlib.util.spec_from_file_location("export", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(export):
    return export.PAGE.read_text()


def shown(page: Path, events: list[str]) -> dict[str, dict]:
    """The text of the page's panels after the events in its address."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
        "--dump-dom", f"{page.as_uri()}#{','.join(events)}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-ready="yes"' in dom
    panels = re.findall(r'class="panel" id="(\w+)" data-state="([^"]+)"', dom)
    found = {kind: json.loads(html.unescape(state)) for kind, state in panels}
    for kind, part in re.findall(r'class="panel" id="(\w+)"(.*?)class="numbers"', dom, re.DOTALL):
        # Where each row's tokens are drawn.
        found[kind]["drawn"] = [
            sorted(int(column) for column in re.findall(r'data-column="(\d+)"', row))
            for row in part.split('class="row"')[1:]
        ]
    return found


def expected(export, events: list[str]) -> dict[str, dict]:
    """The same from BatchShape."""
    found = {}
    for kind, aligned in KINDS.items():
        shape = BatchShape(export.SLOTS, export.CAPACITY, aligned=aligned)
        copied, refused = 0, False
        for event in events:
            try:
                copied += sum(export.apply(shape, event).lengths)
                refused = False
            except ValueError:
                refused = True
        rows = export.rows(shape)
        found[kind] = {
            "width": shape.width,
            "rows": rows,
            "copied": copied,
            "refused": refused,
            "drawn": [list(range(row[0], sum(row))) if row else [] for row in rows],
        }
    return found


def test_the_page_is_what_is_recorded(export, page):
    data = export.unpacked(page)
    assert data == json.loads(json.dumps(export.recorded()))
    packed = re.search(rf'{re.escape(export.MARK)} "([^"]*)"', page)[1]
    assert page.replace(packed, "") == export.TEMPLATE.read_text()


def test_both_shapes_refuse_the_same_events(export, page):
    data = export.unpacked(page)
    order = random.Random(0)
    for _ in range(200):
        states = dict.fromkeys(KINDS, 0)
        for _ in range(40):
            event = order.randrange(len(export.EVENTS))
            found = {kind: data["shapes"][kind]["events"][states[kind]][event] for kind in KINDS}
            assert len({isinstance(result, str) for result in found.values()}) == 1
            for kind, result in found.items():
                states[kind] = states[kind] if isinstance(result, str) else result[0]


def walk(export, seed: int) -> list[str]:
    """Events, more often newcomers and steps than others; some are rejected."""
    order = random.Random(seed)
    weights = [4 if event.startswith(("add", "step")) else 1 for event in export.EVENTS]
    return order.choices(export.EVENTS, weights, k=30)


@in_a_browser
@pytest.mark.parametrize("seed", range(3))
def test_the_browser_shows_what_batch_shape_does(export, seed):
    events = walk(export, seed)
    assert shown(export.PAGE, events) == expected(export, events)


@in_a_browser
def test_a_move_and_a_refusal_are_shown(export):
    events = ["add2", "step", "add5", "cancel1", "trim", "add2", "add2", "add2"]
    found = shown(export.PAGE, events)
    assert found == expected(export, events)
    # Aligned: three tokens move right for the long newcomer, and back when it has left.
    assert (found["ragged"]["copied"], found["aligned"]["copied"]) == (0, 6)
    assert found["aligned"]["refused"]


@in_a_browser
def test_buttons(export, page, tmp_path):
    events = ["add5", "step", "add2", "step", "cancel0", "trim"]
    clicks = ["#reset", "#add5", "#step", "#add2", "#step", "#aligned .row button", "#trim"]
    script = f"""<script>
    const waiting = setInterval(() => {{
      if (!document.body.dataset.ready) return;
      clearInterval(waiting);
      for (const name of {json.dumps(clicks)}) document.querySelector(name).click();
    }}, 10);
    </script></html>"""
    copy = tmp_path / "slots.html"
    copy.write_text(page.replace("</html>", script))
    assert shown(copy, []) == expected(export, events)
