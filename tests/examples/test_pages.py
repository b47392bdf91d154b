"""Programs in documents print the text shown below them.

A program is a block of Python that is followed by a block of text, its output.

| section | what is checked |
| --- | --- |
| programs | each runs by itself and prints the text below it |
| tutorial | its steps are files; the page quotes them and shows their output |
| README | it has two such programs, and stays short |
"""

import re
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ["README.md", "docs/asked.md"]
PROGRAM = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs(page: str) -> list[tuple[str, str]]:
    """Pairs of source and output."""
    return PROGRAM.findall((ROOT / page).read_text())


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in PAGES for number in range(len(programs(page)))],
)
def test_a_program_prints_what_its_page_shows(page, number, monkeypatch):
    monkeypatch.chdir(ROOT)
    source, printed = programs(page)[number]
    done = warm.run("-c", source)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
STEP = re.compile(r"^```bash\npython (\S+)\n```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = STEP.findall(TUTORIAL)


@pytest.mark.parametrize(("program", "printed"), STEPS, ids=[Path(name).stem for name, _ in STEPS])
def test_a_step_of_the_tutorial(program, printed):
    done = warm.run(ROOT / program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_tutorial_quotes_its_steps():
    files = sorted((ROOT / "examples" / "tutorial").glob("step*.py"))
    assert [program for program, _ in STEPS] == [
        path.relative_to(ROOT).as_posix() for path in files
    ]
    quoted = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
    for path, block in zip(files, quoted, strict=True):
        assert block in path.read_text(), path.name


def test_readme_is_short():
    assert len(programs("README.md")) == 2
    words = [
        word for word in (ROOT / "README.md").read_text().split() if any(map(str.isalnum, word))
    ]
    assert len(words) <= 850
