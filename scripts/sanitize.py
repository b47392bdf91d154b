"""The ops' tests with a CPU library compiled with sanitizers and loaded into Python.

    make sanitize                                             # with each instruction set in turn
    python scripts/sanitize.py --isa avx2 baseline -- tests/ops/test_move_kv.py -k matches
    python scripts/sanitize.py --races                        # ThreadSanitizer, ops in threads

Python and torch are not instrumented, but the sanitizer serves their allocations: a tensor has
guards around it, and an access of the library beyond them is reported. Races are reported between
accesses of the library only; locks of Python and torch order them. First, a planted error of every
kind has to be found in the same way. The exit status is 1 if a test failed, if there was a report,
or if a planted error was not found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from instrumented import ROOT, build_package, environment

from baton_kernels.testing import available_cpu_isas


class Planted(NamedTuple):
    """Code that causes an error with a tensor x of n = 40 floats, and the text of its report."""

    code: str
    report: str


class Sanitizers(NamedTuple):
    """How the library is compiled, what is loaded with it, what runs, and what must be found.

    Attributes:
        flags: for the compiler. -O1: the kernels' templates take many times as long to compile with
            -O3, and compute the same.
        libraries: the runtimes. The C++ library too; otherwise they do not intercept exceptions.
        settings: of the runtimes, by variable.
        tests: arguments of pytest.
        planted: by name.
    """

    name: str
    flags: str
    libraries: tuple[str, ...]
    settings: dict[str, str]
    tests: tuple[str, ...]
    planted: dict[str, Planted]

    @property
    def folder(self) -> Path:
        """The build folder."""
        return ROOT / "build" / "sanitize" / self.name


ERRORS = Sanitizers(
    "address",
    "-O1 -fsanitize=address,undefined -fno-sanitize=vptr -g1 -fno-omit-frame-pointer",
    ("asan", "ubsan", "stdc++"),
    # Python keeps memory until it ends, which is not our leak; the tests allocate more memory than
    # there is.
    {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": ""},
    ("tests/ops", "-m", "not slow"),
    {
        "beyond": Planted("return x[n];", "heap-buffer-overflow"),
        "freed": Planted(
            "float* y = new float[4]; delete[] y; return y[n & 3];", "heap-use-after-free"
        ),
        "overflow": Planted(
            "return 2147483647 + static_cast<int>(n);", "signed integer overflow"
        ),
        "shift": Planted("return 1 << n;", "shift exponent"),
    },
)  # fmt: skip
RACES = Sanitizers(
    "thread",
    "-O1 -fsanitize=thread -g1",
    ("tsan", "stdc++"),
    # Reports are read from the log, so the exit status need not tell.
    {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:die_after_fork=0:exitcode=0"},
    # Without torch's threads: OpenMP is not instrumented, so what it waits for looks like a race.
    ("tests/cpu/test_ops_in_threads.py", "tests/cpu/test_team.py", "-k", "threads and not torch"),
    {"race": Planted("for (long i = 0; i < 1000 * n; ++i) x[0] += 1; return x[0];", "data race")},
)
# Several errors occur in separate processes, which their reports end; TSan reports nothing in a
# fork. Two threads call, for the sake of a race: ctypes releases Python's lock. Checks which
# library is loaded, too.
CALL = """
    import ctypes, os, sys, threading, torch, baton_kernels
    assert baton_kernels.__file__.startswith(sys.argv[2]), baton_kernels.__file__
    library = ctypes.CDLL(sys.argv[1])
    x = torch.ones(40)
    start = threading.Barrier(2)
    def call(name):
        start.wait()
        for _ in range(100):
            getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(x.numel()))
    for name in sys.argv[3:]:
        child = os.fork() if len(sys.argv) > 4 else 0
        if child == 0:
            threads = [threading.Thread(target=call, args=(name,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os._exit(0)
        os.waitpid(child, 0)
"""


def main() -> None:
    found = list(available_cpu_isas())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--isa", choices=found, nargs="+", help="instruction sets (default: all; of races the best)"
    )
    parser.add_argument("--races", action="store_true", help="ThreadSanitizer instead")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, behind --")
    arguments = parser.parse_args()
    kind = RACES if arguments.races else ERRORS
    isas = arguments.isa or (found[-1:] if arguments.races else found)
    build_package(kind.folder, kind.flags, isas)
    missed = missed_errors(kind)
    wrong = len(missed)
    for isa in isas:
        # --capture: pytest must not swallow what the sanitizers' runtime prints.
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
            "--capture=sys", *(arguments.tests or kind.tests),
        ]  # fmt: skip
        # Tests of threads have no backend: they run on the only instruction set that was built.
        if arguments.tests or not arguments.races:
            command += ["--backend", f"cpu-{isa}"]
        status, report = under(kind, command)
        print(f"{isa}: exit status {status}, {'a' if report else 'no'} report")
        print(report[:20_000], end="", flush=True)
        wrong += status != 0 or report != ""
    print(f"{len(kind.planted) - len(missed)} of {len(kind.planted)} planted errors found"
          + (f"; missed: {missed}" if missed else ""))  # fmt: skip
    sys.exit(wrong > 0)


def missed_errors(kind: Sanitizers) -> list[str]:
    """The planted errors that were not reported correctly."""
    source, library = kind.folder / "planted.cpp", kind.folder / "libplanted.so"
    source.write_text("".join(
        f'extern "C" float {name}(float* x, long n) {{ (void)x; {planted.code} }}\n'
        for name, planted in kind.planted.items()
    ))  # fmt: skip
    subprocess.run(
        [compiler(), *kind.flags.split(), "-shared", "-fPIC", str(source), "-o", str(library)],
        check=True,
    )
    call = [sys.executable, "-c", textwrap.dedent(CALL), str(library), str(kind.folder)]
    status, report = under(kind, [*call, *kind.planted])
    if status:
        raise SystemExit("sanitize: the sanitized library could not be loaded")
    return [name for name, planted in kind.planted.items() if planted.report not in report]


def under(kind: Sanitizers, command: list[str]) -> tuple[int, str]:
    """Exit status of a command whose Python has the sanitizers' runtimes, and all their reports."""
    logs = kind.folder / "logs"
    logs.mkdir(exist_ok=True)
    for log in logs.iterdir():
        log.unlink()
    options = f"log_path={logs}/log:print_stacktrace=1"
    done = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={
            **environment(kind.folder),
            "LD_PRELOAD": " ".join(file_of(f"lib{name}.so") for name in kind.libraries),
            **{name: f"{options}:{setting}" for name, setting in kind.settings.items()},
        },
    )  # fmt: skip
    # With ASan in the same process, UBSan ignores log_path and prints to standard error.
    undefined = [line + "\n" for line in done.stderr.splitlines() if "runtime error:" in line]
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode, "".join([*undefined, *(log.read_text() for log in logs.iterdir())])


def file_of(library: str) -> str:
    """The compiler's path of this library."""
    done = subprocess.run(
        [compiler(), f"-print-file-name={library}"], capture_output=True, text=True, check=True
    )
    return str(Path(done.stdout.strip()).resolve())


def compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


if __name__ == "__main__":
    main()
