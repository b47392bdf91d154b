#!/usr/bin/env bash
# wheel.sh WHEEL TORCH...: installs one wheel file beside each torch version in a fresh environment
# and runs the op and cache tests there, away from the sources.
set -euo pipefail
wheel=$(realpath "$1")
shift
tests=$(realpath "$(dirname "$0")")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for torch in "$@"; do
  echo "== $(basename "$wheel") with torch $torch"
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip --disable-pip-version-check --quiet install \
    "torch==$torch" numpy pytest hypothesis psutil "$wheel"
  mkdir "$work/run"
  cp -r "$tests"/conftest.py "$tests"/device_ops.py "$tests"/cuda_tools.py "$tests"/emulation \
    "$tests"/test_*_kv.py "$tests"/test_ragged_attention.py \
    "$tests"/test_merge_attention.py "$tests"/test_attention_mask.py "$tests"/test_rms_norm.py \
    "$tests"/test_silu_and_mul.py "$tests"/test_linear.py "$tests"/test_batch_shape.py \
    "$tests"/test_kv_cache.py "$work/run"
  (cd "$work/run" && "$work/venv/bin/python" -m pytest --import-mode=importlib -q . &&
    "$work/venv/bin/python" -c 'import baton_kernels, torch; info = baton_kernels.build_info()
print("torch", torch.__version__, "cuda", torch.version.cuda, "isa", info["cpu"]["isa_used"])')
  rm -rf "$work/venv" "$work/run"
done
