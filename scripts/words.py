"""Counts words that are hard to read, per folder, and the words of the README and of each page.

    python scripts/words.py             # the tables
    python scripts/words.py --list ask  # every place where a pattern's name has "ask" in it
    python scripts/words.py --in FOLDER # of another checkout, to compare with

It reads Markdown outside of code, and comments, docstrings and messages of Python and C++. Each
pattern has a plainer word that usually fits. Some places are right as they are, so there is no
limit for the counts. The README's length has one: tests/examples/test_pages.py.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Name -> the pattern, and what to write instead in most places.
PATTERNS = {
    "alone": (r"\balone\b", "only; by itself"),
    "as many": (r"\b(?:as|so) many\b(?! as)", "the same number; that many"),
    "ask for": (r"\bask(?:s|ed|ing)?(?:\s+\w+){0,2}\s+for\b", "request, prefetch"),
    "of its own": (r"\bof (?:its|their|his|our) own\b", "separate; its own ..."),
    "beside": (r"\bbeside\b", "alongside, compared with, next to"),
    "whatever": (r"\b(?:whatever|whoever)\b", "independent of, whichever"),
    "is no": (r"(?<!there )\b(?:is|are) (?:no|(?-i:none))\b", "is not a, cannot"),
    "on its way": (r"\bon (?:its|their|the) way\b", "in flight"),
}
SUFFIXES = (".md", ".py", ".h", ".cpp", ".cu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", metavar="NAME", help="print the places instead of the counts")
    parser.add_argument("--in", dest="root", type=Path, default=ROOT, metavar="FOLDER")
    arguments = parser.parse_args()
    found: dict[str, Counter[str]] = {}
    for name in listed(arguments.root):
        prose = prose_of(arguments.root / name)
        # Folders of the root, and Markdown separately, because more people read a page.
        folder = name.split("/")[0] if "/" in name else "(root)"
        kind = f"{folder}, pages" if name.endswith(".md") else folder
        for pattern, (expression, _) in PATTERNS.items():
            places = list(re.finditer(expression, prose, re.IGNORECASE))
            found.setdefault(kind, Counter())[pattern] += len(places)
            if arguments.list and arguments.list in pattern:
                for place in places:
                    line = prose.count("\n", 0, place.start())
                    print(f"{name}:{line + 1}: {prose.splitlines()[line].strip()}")
    if not arguments.list:
        print_counts(found)
        print_pages(arguments.root)


def listed(root: Path) -> list[str]:
    if not (root / ".git").exists():
        names = [path.relative_to(root).as_posix() for path in root.rglob("*")]
    else:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.check_output(command, cwd=root, text=True).splitlines()
    return sorted(name for name in names if name.endswith(SUFFIXES) and (root / name).is_file())


def prose_of(path: Path) -> str:
    """The text of a file that is written for people, in its lines; the other lines are blank."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return blank_code(text)
    pieces = python_pieces(text) if path.suffix == ".py" else cpp_pieces(text)
    lines = [""] * (text.count("\n") + 2)
    for line, piece in pieces:
        for number, part in enumerate(piece.split("\n"), start=line):
            lines[number] += part + " "
    return "\n".join(lines)


def blank_code(markdown: str) -> str:
    """Markdown without code blocks, but with the same number of lines."""
    return re.sub(
        r"^( *)(```|~~~).*?^\1\2",
        lambda block: "\n" * block[0].count("\n"),
        markdown,
        flags=re.MULTILINE | re.DOTALL,
    )


def python_pieces(text: str) -> Iterator[tuple[int, str]]:
    """Comments and strings that contain a space, each with its line, counted from 0."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds and " " in token.string.strip():
            yield token.start[0] - 1, token.string


def cpp_pieces(text: str) -> Iterator[tuple[int, str]]:
    """Comments and strings that contain a space, each with its line, counted from 0."""
    for piece in re.finditer(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', text, re.DOTALL):
        if " " in piece[0].strip():
            yield text.count("\n", 0, piece.start()), piece[0]


def print_counts(found: dict[str, Counter[str]]) -> None:
    width = max(map(len, found))
    print(" " * width, *(f"{name:>10}" for name in PATTERNS), f"{'all':>6}")
    total: Counter[str] = Counter()
    for kind, counts in sorted(found.items()):
        total += counts
        columns = (f"{counts[name]:10}" for name in PATTERNS)
        print(f"{kind:{width}}", *columns, f"{sum(counts.values()):6}")
    columns = (f"{total[name]:10}" for name in PATTERNS)
    print(f"{'all':{width}}", *columns, f"{sum(total.values()):6}")
    print("\nmostly meant: " + "; ".join(f"{name}: {word}" for name, (_, word) in PATTERNS.items()))


def print_pages(root: Path) -> None:
    print("\nwords")
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    for path in pages:
        print(f"{count_words(path.read_text()):6} {path.relative_to(root)}")


def count_words(text: str) -> int:
    """The number of words; a table's bar or a dash does not count."""
    return sum(any(map(str.isalnum, word)) for word in text.split())


if __name__ == "__main__":
    main()
