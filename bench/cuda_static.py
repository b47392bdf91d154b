"""Counts of the CUDA kernels, without a GPU: `python -m bench.cuda_static`.

Instructions and sectors are counted in nvcc's own PTX, executed thread by thread
(python/emulation/ptx/machine.py); registers, shared memory and loads in flight are taken from the
machine code for each architecture. No figure here is a speed.
"""

from __future__ import annotations

from bench import describe_run
from emulation.artifacts import ROOT
from emulation.ptx import counts as cuda_counts
from emulation.static import kernels as cuda_static
from emulation.static.cards import CARDS

PEERS = """\
peers on a decode step (32 query / 8 KV heads x 128, bf16, 512 keys), their PTX from nvcc 13
executed likewise, per 128 bytes of keys and values; quoted for reference, not measured here:
 PTX:                            instr.         mma   wavefronts  sectors  per KV head   flight/SM
FlashInfer 0.7.2, CUDA cores     28.9 to 30.5   0     5.0 to 5.5  1.00     788-996       48-72 KB
FlashInfer 0.7.2, tensor cores   5.4            0.52  2.25        1.016    4,207         64-128 KB
flash-attention 2, split-KV      7.6 to 8.5     2.0   5.3         1.00     2,069-6,367   0-64 KB
KV append: FlashInfer            3.4 to 4.3                       1.08
KV append: vLLM style            19                               1.06"""

# Threads of a block, by the beginning of the kernel's name; copy kernels have 128.
THREADS = {"": 128}


def copies() -> None:
    """Instructions and sectors of the copy kernels."""
    print("copy kernels, 8 KV heads x 128, bf16; counts of executed PTX, per 128 bytes of payload")
    print(f"{'op':16} {'work':32} {'launches':>8} {'instructions':>12} {'sectors/useful':>14}")
    for case in cuda_counts.benchmark_cases():
        counts = cuda_counts.count(case)
        print(
            f"{case.op:16} {case.what:32} {counts.launches:>8} {counts.instructions:>12.2f} "
            f"{counts.sectors:>14.3f}"
        )


def decode() -> None:
    """A decode step compared with its peers."""
    print(PEERS)
    for length, page in ((256, None), (2048, None), (2048, 128), (2048, 16), (2048, 7)):
        c = cuda_counts.count_decode(length, page)
        pages = "" if page is None else f", pages of {page}"
        print(
            f"{f'ours, {length} keys{pages}':32} {c.instructions:<8.2f} {c.products:<6.2f}"
            f"{c.wavefronts:<11.2f} {c.loop_sectors:<8.3f} {c.fixed:,.0f}"
        )
        print(
            f"  with queries, results, splits and merge: {c.sectors:.3f} sectors / useful; "
            f"{c.all_wavefronts} shared wavefronts, {c.all_wavefronts / c.ideal_wavefronts:.3f} of "
            f"ideal; merge {c.merge:,.0f} instructions per KV head"
        )
    merges()
    machine_code()
    flight()


def merges() -> None:
    """The launch that sums the splits up."""
    print(
        "merge, launched behind the decode kernel: instructions of a warp until that one has ended"
    )
    print("and from then on, PTX for sm_90")
    for length in (2048, 32768):
        for kv_heads in (1, 8):
            c = cuda_counts.count_merge(length, kv_heads)
            print(
                f"  {length} keys, {c.warps} warps for 4 vectors: {c.before:.0f} and {c.after:.0f}"
            )


def prefill() -> None:
    """A tile of 128 query vectors and 128 keys, on each kernel for rows of several tokens."""
    print(
        "prefill, 128 query vectors x 128 keys that all of them see, 128 dims, bf16; executed PTX:"
    )
    print("       instructions  issue slots  wavefronts  per m16n8k16  TFLOP/s at most: A100  H100")
    for name in ("mma", "mma32", "wgmma"):
        c = cuda_counts.count_prefill(name)
        # An A100 cannot run the kernel of warpgroups.
        a100 = "" if name == "wgmma" else f"{c.tflops('A100'):.0f}"
        h100 = f"{c.tflops('H100'):.0f}"
        print(
            f"{name:6} {c.instructions:>12,.0f} {c.instructions / 4:>12,.0f} "
            f"{c.wavefronts:>11,.0f} {c.wavefronts_per_product:>13.2f} {a100:>22} {h100:>5}"
        )
    for kernel in cuda_static.compile_kernels(cuda_static.WARPGROUP):
        print(
            f"  {kernel.name}: {kernel.registers} registers at first, {kernel.spills} bytes "
            f"spilled, {kernel.shortest_turn()} instructions of machine code in a consumer's turn"
        )


def decode_kernels() -> list[cuda_static.Kernel]:
    """The decode kernel for bfloat16 x 128, for every architecture that has products for it."""
    source = ROOT / "csrc" / "cuda" / "ragged_attention" / "bfloat16.cu"
    return [
        kernel for kernel in cuda_static.compile_kernels(source)
        if "decode_kernel<__nv_bfloat16, 128, 1>" in kernel.name and kernel.has_products()
    ]  # fmt: skip


def machine_code() -> None:
    """The loop of the decode kernel in the machine code that ptxas makes of the PTX counted
    above."""
    print(
        "machine code: instructions of the loop per 128 bytes of keys and values, as above without"
    )
    print("options, masks and rescaling, which most turns skip")
    # One iteration of a warp: 16 keys and values of 256 bytes each.
    lines = 16 * 2 * 256 / 128
    for kernel in decode_kernels():
        print(f"  sm_{kernel.architecture}: {len(kernel.product_loop()) / lines:.2f}")


def flight() -> None:
    """Bytes in flight per multiprocessor in the decode loop."""
    print("KB in flight per SM in the loop: least-mean-most over its instructions,")
    print("as the flow of data allows and as the code's scoreboards have it")
    for kernel in decode_kernels():
        shared = cuda_static.dynamic_shared(kernel.name)
        threads = 128 * kernel.blocks_per_sm(128, shared)
        allowed, real = kernel.loop_flight(), kernel.loop_waits()
        print(
            f"  sm_{kernel.architecture}: {cuda_static.kilobytes(threads, allowed)}, "
            f"{cuda_static.kilobytes(threads, real)}; {kernel.registers} registers"
        )


def compiled() -> None:
    """Registers, occupancy and bytes in flight of every kernel that moves 16 bytes at a time."""
    print("compiled kernels; in flight: resident threads x loads before the first store, against")
    print("bandwidth x latency / SMs of a card (Little's law; latencies are assumptions):")
    for card in CARDS:
        print(
            f"  {card.name}: {card.gigabytes_per_second:.0f} GB/s, {card.latency_ns:.0f} ns, "
            f"{card.multiprocessors} SMs: {card.needed_bytes / 1024:.1f} KB per SM"
        )
    kernels = [
        kernel
        for source in cuda_static.SOURCES
        for kernel in cuda_static.compile_kernels(source)
        if kernel.count(r"LDG\..*128")
    ]
    spilled = sum(kernel.spills + kernel.stack for kernel in kernels)
    print(f"{len(kernels)} kernels with 16-byte loads, {spilled} bytes spilled or in local memory")
    print("\n".join(cuda_static.occupancy_table(kernels, THREADS)))


def main() -> None:
    print(describe_run())
    for part in (decode, prefill, copies, compiled):
        print()
        part()


if __name__ == "__main__":
    main()
