"""Lists the benchmarks: `python -m bench`."""

from __future__ import annotations

import ast
from pathlib import Path


def main() -> None:
    """Prints every module of this folder that can be run, with the first line of its docstring."""
    folder = Path(__file__).parent
    modules = {path.stem: path for path in folder.glob("[!_]*.py")}
    modules |= {path.parent.name: path for path in folder.glob("*/__main__.py")}
    for name, path in sorted(modules.items()):
        first = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        print(f"python -m bench.{name}\n    {first}")
    print("\nEach takes --help. Results are checked before they are timed.")


if __name__ == "__main__":
    main()
