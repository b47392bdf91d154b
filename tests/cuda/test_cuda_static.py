"""The CUDA kernels compiled for every architecture, and nvcc's own PTX executed.

`make test` compiles what stands for the rest, for sm_80. `make test-cuda-build` reads every kernel
and every architecture in the library that it has built.
"""

import re

import pytest

import baton_kernels
from baton_kernels import _library
from emulation import build
from emulation.artifacts import ROOT, run_compiler, run_nvcc
from emulation.cuda.ops import EmulatedOps
from emulation.ptx import counts as cuda_counts
from emulation.ptx.counts import append_case, extract_case, insert_case, merge_case, move_case
from emulation.static import kernels as cuda_static
from emulation.static.cards import CARDS
from emulation.static.kernels import (
    FRONT_END,
    Kernel,
    compile_kernels,
    first_architectures,
    library_kernels,
    other_architectures,
)
from emulation.tools import tool

# `fill_indices` writes a few numbers and reads none.
OTHERS = ("attention", "fill_indices")
COPIES = [
    source
    for source in cuda_static.SOURCES
    if source.parent.name == "cuda" and not any(part in source.stem for part in OTHERS)
]
COPIES += [source for source in cuda_static.SOURCES if source.stem == "merge_attention"]
COPIES_NAMES = r"(append|extract|insert|move)_kv|merge_attention"


def compiled(sources, name=""):
    """For each source the architectures that represent the others; with --full also the others.

    Where the library is built, also its kernels whose names match, for each architecture.
    """
    cases = []
    for source in sources:
        first, others = first_architectures(source), other_architectures(source)
        if first:
            cases.append(pytest.param(source, first, id=source.stem))
        cases.append(pytest.param(source, others, id=f"{source.stem}-rest", marks=pytest.mark.full))
    if name and _library.cuda is not None:
        for each in baton_kernels.build_info()["cuda"]["architectures"]:
            number = int(each.removeprefix("sm_"))
            cases.append(pytest.param(name, (number,), id=f"library-{each}"))
    return pytest.mark.parametrize(("source", "architectures"), cases)


def kernels_of(source, architectures):
    """The kernels of a file, or those of the library whose names match."""
    if isinstance(source, str):
        kernels = library_kernels(_library.cuda, *architectures)
        matching = [kernel for kernel in kernels if re.match(source, kernel.name)]
        assert matching, source
        return matching
    return compile_kernels(source, architectures)


def is_wide(kernel: Kernel) -> bool:
    """Whether its chunks have 16 bytes: 16 bytes, eight 16-bit elements or four floats."""
    name = kernel.name
    return bool(re.search(r"kernel<16\b|(half|bfloat16), (\w+, )?8\b|float, 4\b", name))


@pytest.mark.long
@compiled(cuda_static.SOURCES)
def test_compiles_without_spills_or_local_memory(source, architectures):
    kernels = compile_kernels(source, architectures)
    assert {kernel.architecture for kernel in kernels} == set(architectures)
    for kernel in kernels:
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        assert kernel.opcodes and kernel.count(r"LDL|STL") == 0, kernel.name


def test_sources_tell_no_architectures_apart_that_share_a_front_end():
    """Otherwise one PTX would not do for both: sm_80 and sm_90 are the only boundaries in the
    sources."""
    headers = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu")]
    text = "\n".join(path.read_text() for path in headers)
    borders = re.findall(r"(?:__CUDA_ARCH__|BATON_ARCH) *([<>=!]+) *(\d+)", text)
    assert set(borders) == {(">=", "800"), (">=", "900"), ("==", "0")}


@pytest.mark.full
@pytest.mark.parametrize("source", cuda_static.SOURCES, ids=lambda source: source.stem)
def test_architectures_of_one_front_end_have_the_same_ptx(source, tmp_path):
    def ptx(architecture):
        path = tmp_path / f"{architecture}.ptx"
        run_nvcc(
            "-std=c++20", "-O3", "-I", "csrc", "-ptx", f"-arch=compute_{architecture}", source,
            "-o", path,
        )  # fmt: skip
        return re.sub(r"\.target sm_\d+", "", path.read_text())

    first = {front_end: ptx(front_end) for front_end in set(FRONT_END.values())}
    for architecture, front_end in FRONT_END.items():
        if architecture != front_end:
            assert ptx(architecture) == first[front_end], architecture


@compiled(COPIES, COPIES_NAMES)
def test_copies_move_16_bytes_at_a_time(source, architectures):
    wide = [kernel for kernel in kernels_of(source, architectures) if is_wide(kernel)]
    assert {kernel.architecture for kernel in wide} == set(architectures)
    for kernel in wide:
        assert kernel.count(r"LDG\..*128") >= 1 and kernel.count(r"STG\..*128") >= 1, kernel.name


@compiled(COPIES, COPIES_NAMES)
def test_enough_bytes_in_flight(source, architectures):
    """Little's law for each card, with all of an SM's resident threads loading."""
    for kernel in kernels_of(source, architectures):
        assert kernel.blocks_per_sm(128) >= 2, kernel
        for card in CARDS:
            # A merge is launched on data that a decode step has just left in the L2 cache.
            if is_wide(kernel) and card.architecture == kernel.architecture and (
                not kernel.name.startswith("merge_attention")
            ):  # fmt: skip
                in_flight = kernel.blocks_per_sm(128) * 128 * kernel.loads_in_flight()
                assert in_flight >= card.needed_bytes, (kernel.name, card.name, in_flight)


CASES = [
    insert_case(60, 2, 3), extract_case(60, 2, 3), move_case(2, 2, 50, 7), append_case(20),
    append_case(20, 16), merge_case(9, 8),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.what}")
def test_judge_and_ptx_machine_count_the_same_sectors(case):
    """Two counts for keys, values and outputs agree, from the code of two compilers."""
    ops = EmulatedOps(build.JUDGED)
    ops.traffic()
    with ops.entered():
        getattr(ops, case.op)(**case.arguments)
    judged = sum(entry["sectors"] for side in ops.traffic() for entry in side.values())
    counted = sum(machine.sectors for _, machine in cuda_counts.run_on_ptx(case).machines)
    # Either compiler may merge or repeat narrow loads of angles, slots and starts.
    assert counted == pytest.approx(judged, rel=0.1)


# Warp instructions per 128 bytes, and sectors over useful ones. Rotation takes 7 of the former and
# angles that are read once 0.021 of the latter (docs/cuda.md).
TARGETS = [
    (insert_case(512, 32, 1), 2, 1.02), (insert_case(64, 32, 16), 2.1, 1.02),
    (insert_case(16, 32, 1), 2, 1.02), (extract_case(512, 32, 1), 2, 1.02),
    (move_case(8, 4, 256, 1), 2, 1.02), (move_case(8, 4, 256, 64), 2, 1.02),
    (append_case(64), 2, 1.02), (append_case(64, 32), 8, 1.025),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "instructions", "sectors"),
    TARGETS,
    ids=[f"{case.op}-{case.what}" for case, *_ in TARGETS],
)
def test_copies_meet_their_targets(case, instructions, sectors):
    counts = cuda_counts.count(case)
    assert counts.launches == 1
    assert counts.instructions <= instructions
    assert counts.sectors <= sectors


def test_decode_step_meets_its_targets():
    counts = cuda_counts.count_decode(2048)
    assert counts.instructions <= 3.5 and counts.products <= 0.3 and counts.wavefronts <= 0.5
    assert counts.loop_sectors <= 1.01 and counts.sectors <= 1.07
    # A block finds its item on the device, so that the grid need not grow with the capacity.
    assert counts.fixed <= 1200
    assert counts.instructions <= 2.53
    assert counts.all_wavefronts <= 1.1 * counts.ideal_wavefronts


ATTENTION = [s for s in cuda_static.SOURCES if s.parent.name == "ragged_attention"]


@compiled(cuda_static.SOURCES, ".")
def test_tensor_cores_where_they_are_meant(source, architectures):
    """sm_75 has none for bfloat16; the prefill kernel of two tiles is for sm_80 to sm_90."""
    for kernel in kernels_of(source, architectures):
        meant = re.search(r"(decode|prefill)_kernel<(\w+)", kernel.name)
        expected = meant and (kernel.architecture > 75 or meant[2] == "__half")
        if cuda_static.has_two_tiles(kernel.name) and not 80 <= kernel.architecture <= 90:
            assert len(kernel.opcodes) < 20, kernel.name
            meant = expected = None
        assert (kernel.count("HMMA") > 0) == bool(expected), kernel.name
        if meant:
            assert kernel.count(r"LDG\..*128|LDGSTS\..*128") >= 1, kernel.name


@compiled(ATTENTION, "ragged_attention")
def test_attention_fits_the_occupancy_it_was_cut_for(source, architectures):
    """The blocks per SM for which decode_blocks() and prefill_blocks() leave registers."""
    for kernel in kernels_of(source, architectures):
        found = re.search(r"(decode|prefill)_kernel<\w+, (\d+)(?:, (\d+))?>", kernel.name)
        two_tiles = cuda_static.has_two_tiles(kernel.name)
        # Others have no code for two tiles.
        if not found or (two_tiles and not 80 <= kernel.architecture <= 90):
            continue
        head_dim = int(found[2])
        if found[1] == "decode":
            tiles = int(found[3])
            registers = head_dim // 2 + tiles * (head_dim // 4 + head_dim // 8) + 56
            blocks = 4 if registers <= 128 else 3 if registers <= 168 else 2
        else:
            blocks = 3 if head_dim <= 96 else 2
        assert kernel.blocks_per_sm(128) >= blocks, kernel.name
        # Shared memory: sm_75 has 64 KB, and queries of 256 dims take what a second block would
        # need.
        resident = kernel.blocks_per_sm(128, cuda_static.dynamic_shared(kernel.name))
        small = kernel.architecture == 75 or head_dim > 128
        # The host selects two tiles only where two blocks have room.
        small |= two_tiles and kernel.architecture not in (80, 90)
        assert resident >= (1 if small else 2), kernel.name


@compiled(
    [s for s in ATTENTION if s.stem == "bfloat16"], r"ragged_attention_decode_kernel<\w+, 128, 1>"
)
def test_decode_has_loads_in_flight_all_the_time(source, architectures):
    """Data allow 36 KB at any moment and 64 KB on average. Warps that wait for keys and values
    together have none in flight just then, and 32 KB on average, which is what an A100 and an
    H100 need and more."""
    for kernel in kernels_of(source, architectures):
        name = "decode_kernel<__nv_bfloat16, 128, 1>"
        if kernel.architecture in (80, 90, 100) and name in kernel.name:
            shared = cuda_static.dynamic_shared(kernel.name)
            threads = 128 * kernel.blocks_per_sm(128, shared)
            allowed, real = kernel.loop_flight(), kernel.loop_waits()
            assert threads * allowed.least >= 36 << 10, kernel.name
            assert threads * allowed.mean >= 64 << 10, kernel.name
            assert threads * real.mean >= 32 << 10, kernel.name


# The judge itself.


def compile_text(tmp_path, text: str) -> Kernel:
    source = tmp_path / "kernel.cu"
    source.write_text(text)
    done = run_nvcc("-arch=sm_80", "-Xptxas", "-v", "-cubin", source, "-o", tmp_path / "cubin")
    sass = run_compiler([tool("cuobjdump"), "-sass", tmp_path / "cubin"])
    listing = "\n".join(cuda_static.shortened(sass.stdout))
    return cuda_static.parse(done.stderr, listing)[0]


def test_local_memory_is_seen(tmp_path):
    kernel = compile_text(tmp_path, """
        __global__ void f(float* x, const int* places) {
          float values[64];
          for (int i = 0; i < 64; ++i) values[places[i]] = x[i];
          for (int i = 0; i < 64; ++i) x[i] = values[places[63 - i]];
        }""")  # fmt: skip
    assert kernel.stack > 0 and kernel.count(r"LDL|STL") > 0


def test_spills_are_seen(tmp_path):
    kernel = compile_text(tmp_path, """
        __global__ void __launch_bounds__(1024, 2) f(float* x) {
          float values[80];
          for (int i = 0; i < 80; ++i) values[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 80; ++i) x[i * 1024 + threadIdx.x] = values[i] * values[(i + 7) % 80];
        }""")  # fmt: skip
    assert kernel.spills > 0


def test_narrow_accesses_are_seen(tmp_path):
    kernel = compile_text(tmp_path, "__global__ void f(float* x) { x[threadIdx.x] += 1; }")
    assert kernel.count(r"LDG") == 1 and kernel.count(r"LDG\..*128") == 0


LOOP = """
    __global__ void f(const uint4* x, float* out, int n) {
      float d[4] = {};
      uint4 next = x[threadIdx.x];
      for (int i = 0; i < n; ++i) {
        const uint4 a = next;
        next = x[(i + 1) * 32 + threadIdx.x];
        %s
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%%0, %%1, %%2, %%3}, "
                     "{%%4, %%5, %%6, %%7}, {%%4, %%5}, {%%0, %%1, %%2, %%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w));
      }
      out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
    }"""


def test_what_a_loop_waits_for_is_seen(tmp_path):
    """A load that waits at once for its result leaves nothing in flight."""
    late = compile_text(tmp_path, LOOP % "").loop_waits()
    use = "if (next.x == 12345) out[0] = 1;"
    early = compile_text(tmp_path, LOOP % use).loop_waits()
    assert late.least >= 16
    assert early.least == 0 and early.mean < late.mean


def test_occupancy_is_that_of_the_cuda_calculator():
    """Figures of NVIDIA's occupancy calculator."""
    assert Kernel("", 80, registers=64).blocks_per_sm(256) == 4
    assert Kernel("", 80, registers=32).blocks_per_sm(128) == 16
    assert Kernel("", 86, registers=40).blocks_per_sm(256) == 6
    assert Kernel("", 90, registers=32).blocks_per_sm(256, dynamic_shared=100 * 1024) == 2
    assert Kernel("", 75, registers=255).blocks_per_sm(256) == 1
