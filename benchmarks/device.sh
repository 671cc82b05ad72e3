#!/bin/sh
# Test and measure the kernels on this machine's GPU: sh benchmarks/device.sh [results directory]
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=kernels:proto/python:worker:.
python3 -m pytest tests/gpu/test_kernels.py -c /dev/null --rootdir . --import-mode=importlib \
	-p no:cacheprovider -q
python3 -m benchmarks.kernels --directory "${1:-benchmarks/results}" \
	${LORRY_COMMIT:+--commit "$LORRY_COMMIT"}
