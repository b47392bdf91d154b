"""Line and branch coverage of the CPU library's checks and of the ops, for given tests.

    make coverage                                        # with DEFAULT_TESTS
    python scripts/measure_coverage.py tests/ops/test_move_kv.py
    python scripts/measure_coverage.py --print           # prints the last run again

It builds the library with gcov's counters into build/coverage, runs pytest with it, and prints for
csrc/common, csrc/bindings and baton_kernels/ops what was executed, and every line and branch that
was not. Branches to an exception's landing pad are not counted, because every call has one.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

from instrumented import ROOT, build_package, environment

BUILD = ROOT / "build" / "coverage"
FOLDERS = ("csrc/common", "csrc/bindings", "baton_kernels/ops")
# Without emulated kernels, which are different code.
DEFAULT_TESTS = ["tests/ops", "tests/cache", "tests/cpu/test_ops_in_threads.py", "--quick"]


def main() -> None:
    tests = sys.argv[1:] or DEFAULT_TESTS
    data = BUILD / "python.json"
    status = 0 if tests == ["--print"] else measure(tests, data)
    rows = [*cpp_rows(), *python_rows(data)]
    print_rows(rows)
    print(f"tests: {' '.join(tests)}; pytest's exit status {status}")
    sys.exit(status)


def measure(tests: list[str], data: Path) -> int:
    """Builds, runs pytest, and leaves the counts in the build folder; returns pytest's exit
    status."""
    # A single instruction set: the higher ones are compiled from the same sources.
    build_package(BUILD, "-O0 --coverage -fprofile-update=atomic", isas=[])
    for counts in BUILD.rglob("*.gcda"):
        counts.unlink()
    variables = environment(BUILD) | {"COVERAGE_FILE": str(BUILD / ".coverage")}
    run_common()
    command = [
        sys.executable, "-m", "coverage", "run", "--branch", "--include=*/baton_kernels/ops/*",
        "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *tests,
    ]  # fmt: skip
    status = subprocess.run(command, cwd=ROOT, env=variables).returncode
    subprocess.run(
        [sys.executable, "-m", "coverage", "json", "-q", "-o", str(data)],
        cwd=ROOT, env=variables, check=True,
    )  # fmt: skip
    return status


def run_common() -> None:
    """Runs the program that has csrc/common by itself; its counts are added to the library's."""
    program = BUILD / "common" / "common"
    program.parent.mkdir(exist_ok=True)
    compiler = os.environ.get("CXX", "g++").split()[0]
    sources = [ROOT / "tests" / "cpu" / "common.cpp", ROOT / "csrc" / "common" / "dispatch.cpp"]
    subprocess.run(
        [compiler, "-std=c++20", "-O0", "--coverage", "-DBATON_COVERAGE", "-I", ROOT / "csrc",
         *sources, "-o", program],
        cwd=program.parent, check=True,
    )  # fmt: skip
    subprocess.run([program], check=True)


Row = tuple[str, int, int, int, int, list[str]]


def cpp_rows() -> list[Row]:
    """For each file: lines, executed lines, branches, taken branches, and what was missed."""
    lines: dict[tuple[str, int], int] = collections.Counter()
    branches: dict[tuple[str, int, int], int] = collections.Counter()
    for counts in BUILD.rglob("*.gcda"):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", "--branch-probabilities", str(counts)],
            cwd=counts.parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for text in done.stdout.splitlines():
            for file in json.loads(text)["files"]:
                path = Path(counts.parent, file["file"]).resolve()
                if not path.is_relative_to(ROOT) or file["file"].endswith(".gcda"):
                    continue
                name = str(path.relative_to(ROOT))
                if not name.startswith(FOLDERS):
                    continue
                for line in file["lines"]:
                    lines[name, line["line_number"]] += line["count"]
                    for number, branch in enumerate(line["branches"]):
                        if not branch["throw"]:
                            branches[name, line["line_number"], number] += branch["count"]
    rows: list[Row] = []
    for name in sorted({name for name, _ in lines}):
        mine = {line: count for (file, line), count in lines.items() if file == name}
        taken = {key[1:]: count for key, count in branches.items() if key[0] == name}
        missing = [f"line {line}" for line, count in sorted(mine.items()) if not count]
        missing += [
            f"branch {number} of line {line}"
            for (line, number), count in sorted(taken.items())
            if not count and mine[line]
        ]
        rows.append(
            (name, len(mine), sum(map(bool, mine.values())), len(taken),
             sum(map(bool, taken.values())), missing)
        )  # fmt: skip
    return rows


def python_rows(data: Path) -> list[Row]:
    """The same for baton_kernels/ops."""
    rows: list[Row] = []
    for path, file in sorted(json.loads(data.read_text())["files"].items()):
        summary = file["summary"]
        missing = [f"line {line}" for line in file["missing_lines"]]
        missing += [f"branch of line {a} to {b}" for a, b in file["missing_branches"]]
        rows.append(
            ("baton_kernels/ops/" + Path(path).name, summary["num_statements"],
             summary["covered_lines"], summary["num_branches"], summary["covered_branches"],
             missing)
        )  # fmt: skip
    return rows


def print_rows(rows: list[Row]) -> None:
    for name, lines, run, branches, taken, missing in rows:
        print(f"{name}: lines {run}/{lines}, branches {taken}/{branches}")
        for place in missing:
            print(f"    {place}")
    for folder in FOLDERS:
        mine = [row for row in rows if row[0].startswith(folder)]
        lines, run, branches, taken = (sum(row[i] for row in mine) for i in range(1, 5))
        print(
            f"{folder}: lines {run}/{lines} = {run / max(lines, 1):.1%}, "
            f"branches {taken}/{branches} = {taken / max(branches, 1):.1%}"
        )


if __name__ == "__main__":
    main()
