"""The ops' tests with a CPU library compiled with ASan and UBSan and loaded into Python.

    make sanitize
    python scripts/sanitize.py tests/ops/test_move_kv.py -k matches
    python scripts/sanitize.py --isa avx512                   # every set up to this one

Python and torch are not instrumented, but the sanitizer serves their allocations: a tensor has
guards around it, and an access of the library beyond them is reported. First, a planted error of
every kind has to be found in the same way. The exit status is 1 if a test failed, if there was a
report, or if a planted error was not found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from instrumented import ROOT, build_package, environment

BUILD = ROOT / "build" / "sanitize" / "address"
# -O1: the kernels' templates take many times as long to compile with -O3, and compute the same.
OPTIONS = "-O1 -fsanitize=address,undefined -fno-sanitize=vptr -g1 -fno-omit-frame-pointer"
TESTS = ["tests/ops", "-m", "not slow"]
# The compiler flag that each instruction set needs, lowest set first.
ISAS = {"baseline": "", "avx2": "mavx2", "avx512": "mavx512f", "avx512_bf16": "mavx512bf16"}
# Kind of error -> code that causes it with a tensor x of n = 40 floats, and the text of its report.
PLANTED = {
    "beyond": ("return x[n];", "heap-buffer-overflow"),
    "freed": ("float* y = new float[4]; delete[] y; return y[n & 3];", "heap-use-after-free"),
    "overflow": ("return 2147483647 + static_cast<int>(n);", "signed integer overflow"),
    "shift": ("return 1 << n;", "shift exponent"),
}
# Each error occurs in a separate process, which its report ends. Checks which library is loaded,
# too.
CALL = """
    import ctypes, os, sys, torch, baton_kernels
    assert baton_kernels.__file__.startswith(sys.argv[2]), baton_kernels.__file__
    library = ctypes.CDLL(sys.argv[1])
    x = torch.ones(40)
    for name in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(x.numel()))
            os._exit(0)
        os.waitpid(child, 0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=ISAS, default="avx2", help="the best that is built")
    arguments, tests = parser.parse_known_args()
    best = list(ISAS).index(arguments.isa)
    left_out = [flag for i, flag in enumerate(ISAS.values()) if i > best]
    build_package(BUILD, OPTIONS, without=[*left_out, "mamx_tile"])
    missed = missed_errors()
    wrong = len(missed)
    for isa in list(ISAS)[: best + 1]:
        # --capture: pytest must not swallow what the sanitizers' runtime prints.
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
            "--capture=sys", "--backend", f"cpu-{isa}", *(tests or TESTS),
        ]  # fmt: skip
        status, report = under(command)
        print(f"{isa}: exit status {status}, {'a' if report else 'no'} report")
        print(report[:20_000], end="")
        wrong += status != 0 or report != ""
    found = len(PLANTED) - len(missed)
    print(f"{found} of {len(PLANTED)} planted errors found; missed: {missed}")
    sys.exit(wrong > 0)


def missed_errors() -> list[str]:
    """The planted errors that were not reported correctly."""
    source, library = BUILD / "planted.cpp", BUILD / "libplanted.so"
    source.write_text("".join(
        f'extern "C" float {name}(float* x, long n) {{ (void)x; {code} }}\n'
        for name, (code, _) in PLANTED.items()
    ))  # fmt: skip
    subprocess.run(
        [compiler(), *OPTIONS.split(), "-shared", "-fPIC", str(source), "-o", str(library)],
        check=True,
    )
    call = [sys.executable, "-c", textwrap.dedent(CALL), str(library), str(BUILD), *PLANTED]
    status, report = under(call)
    if status:
        raise SystemExit("sanitize: the sanitized library could not be loaded")
    return [name for name, (_, said) in PLANTED.items() if said not in report]


def under(command: list[str]) -> tuple[int, str]:
    """Exit status of a command whose Python has the sanitizers' runtimes, and all their reports."""
    logs = BUILD / "logs"
    logs.mkdir(exist_ok=True)
    for log in logs.iterdir():
        log.unlink()
    # The C++ library too; otherwise the runtime does not intercept exceptions.
    preloaded = [file_of(f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")]
    options = f"log_path={logs}/log:print_stacktrace=1"
    done = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={
            **environment(BUILD),
            "LD_PRELOAD": " ".join(preloaded),
            # Python keeps memory until it ends, which is not our leak; the tests allocate more
            # memory than there is.
            "ASAN_OPTIONS": f"{options}:detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": options,
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
