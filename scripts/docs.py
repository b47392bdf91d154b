"""Builds the documentation site into build/docs, and fails on any error in it.

    python scripts/docs.py            # all of it
    python scripts/docs.py --sources  # only step 1

1. The links of every Markdown file in the repository are checked: files, and anchors in them.
2. docs/ is assembled with pages that are files from other folders (CONTRIBUTING.md, the programs in
   examples/), where readers of the sources look for them. A link to a file that is not a page
   becomes plain text, because the site does not know where the repository is published.
3. The site is built; a docstring or a reference that does not resolve is an error.
4. In the result, every link must have a target, and no page may load anything from a network.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "docs"
# Page -> the file that it is made from.
BORROWED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "emulation.md": "python/emulation/README.md",
    "index.md": "README.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def main() -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    sources = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    stop_at([fault for name in sources for fault in broken_links(ROOT / name)])
    if "--sources" in sys.argv:
        print(f"links of {len(sources)} Markdown files: none is broken")
        return
    assemble()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, end="")
    if done.returncode != 0:
        sys.exit(done.returncode)
    # A docstring that griffe cannot parse gives a warning that --strict ignores.
    stop_at([line for line in done.stdout.splitlines() if line.startswith("griffe:")])
    stop_at(faults_of_site(SITE))
    print(f"{SITE.relative_to(ROOT)}/index.html: no broken link, nothing from a network")


def stop_at(faults: list[str]) -> None:
    if faults:
        sys.exit("\n".join(faults))


# The sources.


def without_code(markdown: str) -> str:
    markdown = re.sub(r"^( *)(```|~~~).*?^\1\2", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", markdown)


def anchors(file: Path) -> set[str]:
    """Anchors of a Markdown file's headings, as the site and most hosts make them."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?)(?: *\{ *#([\w-]+) *\})?$", text, flags=re.MULTILINE)
    return {
        given or re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        for title, given in headings
    }


def broken_links(file: Path) -> list[str]:
    """Links of a Markdown file whose target is not a file of the repository, or not a heading in
    it."""
    faults = []
    for link in LINK.finditer(without_code(file.read_text())):
        url = urlsplit(link["target"])
        if url.scheme:
            continue
        target = (file.parent / unquote(url.path)).resolve() if url.path else file
        if not target.is_relative_to(ROOT) or not target.exists():
            faults.append(f"{file.relative_to(ROOT)}: no such file: {link['target']}")
        elif url.fragment and target.suffix == ".md" and url.fragment not in anchors(target):
            faults.append(f"{file.relative_to(ROOT)}: no such heading: {link['target']}")
    return faults


# The pages.


def assemble() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for page in sorted(
        {*BORROWED, *(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))}
    ):
        source = ROOT / BORROWED.get(page, f"docs/{page}")
        text = LINK.sub(
            lambda link, page=page, source=source: as_page(link, page, source), source.read_text()
        )
        (PAGES / page).write_text(text)
    programs = sorted((ROOT / "examples").rglob("*.py"))
    (PAGES / "examples.md").write_text("# Examples\n" + "".join(map(as_section, programs)))


def as_section(program: Path) -> str:
    name = program.relative_to(ROOT / "examples").as_posix()
    return f"\n## {name}\n\n```python\n{program.read_text()}```\n"


def as_page(link: re.Match, page: str, source: Path) -> str:
    """Converts a link to a repository file into a link of the site."""
    url = urlsplit(link["target"])
    if url.scheme or not url.path:
        return link[0]
    name = os.path.relpath((source.parent / url.path).resolve(), ROOT)
    pages = {file: page for page, file in BORROWED.items()}
    if name.startswith("docs/"):
        pages[name] = name.removeprefix("docs/")
    if Path(name).parts[0] == "examples":
        pages[name] = "examples.md"
    if name not in pages:
        return link["text"]
    target = os.path.relpath(pages[name], Path(page).parent)
    fragment = f"#{url.fragment}" if url.fragment else ""
    return f"{link['image']}[{link['text']}]({target}{fragment})"


# The site.


class Page(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.update(values[name] for name in ("id", "name") if values.get(name))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values.get("href") or "")
        elif values.get("src"):
            self.loads.append(values["src"])


def faults_of_site(site: Path) -> list[str]:
    """Links and files that do not exist, and everything that a page loads from a network."""
    # 404.html is served for any path, so its links begin at the root of a server.
    pages = {
        path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"
    }
    faults = []
    for path, page in pages.items():
        for reference in [*page.links, *page.loads]:
            url = urlsplit(reference)
            if url.scheme or url.netloc:
                if reference in page.loads and url.scheme != "data":
                    faults.append(f"{path.relative_to(site)}: loads {reference}")
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                faults.append(f"{path.relative_to(site)}: no such file: {reference}")
            elif (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                faults.append(f"{path.relative_to(site)}: no such anchor: {reference}")
    return faults


if __name__ == "__main__":
    main()
