"""Files per folder, imports between the rooms of a package, and import cycles.

    python scripts/structure.py [--root FOLDER] [--edges]

Reads only the sources. Every import statement counts, including those inside functions and under
TYPE_CHECKING, so that a cycle cannot hide. The tests require that this prints no cycle.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Graph = dict[str, set[str]]


def find_packages(root: Path) -> dict[str, Path]:
    """The packages of a checkout, by name."""
    folders = sorted([*root.glob("*/__init__.py"), *root.glob("python/*/__init__.py")])
    return {init.parent.name: init.parent for init in folders}


def find_modules(packages: Mapping[str, Path]) -> dict[str, Path]:
    """The modules of packages, by dotted name; a package's name is its `__init__`."""
    modules = {}
    for name, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported_names(path: Path, module: str) -> Iterator[tuple[str, str | None]]:
    """The imports of a file: (module, name); name is None for `import module`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield from ((source, alias.name) for alias in node.names)


def bound_names(path: Path) -> set[str]:
    """Names that a module defines, assigns or imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def import_graph(modules: Mapping[str, Path]) -> Graph:
    """Maps each module to those of the modules that it imports.

    Packages on the path of a dotted name are imported too, but only for their names; they do not
    count, because otherwise every module would depend on the facade above it.
    """
    graph: Graph = {}
    for module, path in modules.items():
        targets = graph.setdefault(module, set())
        for source, name in imported_names(path, module):
            if f"{source}.{name}" in modules:
                targets.add(f"{source}.{name}")
            # A name that a package does not bind is a compiled module in its folder.
            elif source in modules and (name is None or name in bound_names(modules[source])):
                targets.add(source)
        targets.discard(module)
    return graph


def room_of(module: str) -> str:
    """The package's folder or file that a module is in: `baton_engines.relay.batch` is in
    `baton_engines.relay`."""
    return ".".join(module.split(".")[:2])


def contract(graph: Graph) -> Graph:
    """The graph of rooms."""
    rooms: Graph = {}
    for module, targets in graph.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update({room_of(target) for target in targets} - {room})
    return rooms


def find_cycles(graph: Graph) -> list[list[str]]:
    """Sets of modules that import each other, directly or indirectly (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            first = stack.index(module)
            members = stack[first:]
            del stack[first:]
            if len(members) > 1:
                found.append(sorted(members))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def files_per_folder(root: Path, folders: Mapping[str, Path]) -> Counter[str]:
    """Python files in each folder of the packages."""
    files = (path for folder in folders.values() for path in folder.rglob("*.py"))
    return Counter(str(path.parent.relative_to(root)) for path in files)


def main() -> None:
    """Prints the structure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout; default: this one")
    parser.add_argument("--edges", action="store_true", help="list who imports whom, by room")
    options = parser.parse_args()
    packages = find_packages(options.root.resolve())
    print("files per folder")
    for folder, count in sorted(files_per_folder(options.root.resolve(), packages).items()):
        print(f"  {count:4}  {folder}")
    for name, folder in packages.items():
        graph = import_graph(find_modules({name: folder}))
        rooms = contract(graph)
        count = sum(map(len, graph.values()))
        between = sum(map(len, rooms.values()))
        cycles = [*find_cycles(graph), *find_cycles(rooms)]
        print(f"{name}: {count} imports between {len(graph)} modules, {between} between")
        print(f"  {len(rooms)} rooms, {len(cycles)} cycles")
        for cycle in cycles:
            print(f"  cycle: {', '.join(cycle)}")
        if options.edges:
            for room, targets in sorted(rooms.items()):
                print(f"  {room} -> {', '.join(sorted(targets)) or '-'}")


if __name__ == "__main__":
    main()
