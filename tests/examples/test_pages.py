"""Programs in documents print what stands below them.

A program is a block of Python that a block of text follows; the text is its output.

| section | what is held |
| --- | --- |
| programs | each runs by itself and prints the text below it |
| README | it has two such programs, and stays short |
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ["README.md"]
PROGRAM = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs(page: str) -> list[tuple[str, str]]:
    """Pairs of source and output."""
    return PROGRAM.findall((ROOT / page).read_text())


def run(source: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **variables},
    )


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number in range(len(programs(page)))],
)
def test_a_program_prints_what_its_page_shows(page, number):
    source, printed = programs(page)[number]
    done = run(source)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_readme_is_short():
    assert len(programs("README.md")) == 2
    words = [
        word for word in (ROOT / "README.md").read_text().split() if any(map(str.isalnum, word))
    ]
    assert len(words) <= 1000
