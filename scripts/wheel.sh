#!/usr/bin/env bash
# wheel.sh WHEEL TORCH...: installs one wheel file beside each torch version in a fresh environment
# and runs the op and cache tests there, away from the sources.
set -euo pipefail
wheel=$(realpath "$1")
shift
root=$(realpath "$(dirname "$0")/..")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for torch in "$@"; do
  echo "== $(basename "$wheel") with torch $torch"
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip --disable-pip-version-check --quiet install \
    "torch==$torch" numpy pytest hypothesis psutil "$wheel"
  mkdir -p "$work/run/tests"
  (cd "$root/tests" && cp -r conftest.py support ops cache "$work/run/tests")
  cp -r "$root/python/emulation" "$work/run"
  (cd "$work/run" &&
    ops=$("$work/venv/bin/python" -c 'import baton_kernels
print(*(f"tests/ops/test_{op}.py" for op in baton_kernels.ops.__all__))') &&
    "$work/venv/bin/python" -m pytest --rootdir=. --import-mode=importlib -q $ops \
      tests/cache/test_batch_shape.py tests/cache/test_kv_cache.py &&
    "$work/venv/bin/python" -c 'import baton_kernels, torch; info = baton_kernels.build_info()
print("torch", torch.__version__, "cuda", torch.version.cuda, "isa", info["cpu"]["isa_used"])')
  rm -rf "$work/venv" "$work/run"
done
