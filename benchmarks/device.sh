#!/bin/sh
# Test and measure on this machine's GPU: sh benchmarks/device.sh PART [results directory]
#
# Each part takes less than ten minutes on an H200. `wheels` runs where a package index can be
# reached; the other parts take from its folder what a machine with only torch and triton lacks.
set -eu
cd "$(dirname "$0")/.."
PARTS="wheels kernel-tests engine-tests rates latency llama-3-8b llama-3-8b-mixed llama-2-7b llama-2-7b-mixed"
PACKAGES="crc32c cyclopts docstring_parser googleapis-common-protos grpcio-health-checking
	grpcio-reflection grpcio-status msgspec prometheus_client rich-rst"
WHEELS=.carry/wheels
MIXED="8 16 32 64"
results="${2:-benchmarks/results}"

bench() {
	name=$1
	shift
	python3 -m "benchmarks.$name" "$@" --directory "$results" \
		${LORRY_COMMIT:+--commit "$LORRY_COMMIT"}
}

tests() {
	python3 -m pytest "$@" -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider -q \
		--durations=10
}

case " $PARTS " in
*" ${1:-none} "*) ;;
*)
	echo "usage: sh benchmarks/device.sh PART [results directory]; PART is one of: $PARTS" >&2
	exit 2
	;;
esac
if [ "$1" = wheels ]; then
	rm -rf $WHEELS
	exec .venv/bin/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
		--constraint constraints-cpu.txt --dest $WHEELS $PACKAGES
fi
if [ -d $WHEELS ]; then
	python3 -m pip install --quiet --no-index --no-deps --upgrade --target $WHEELS/site $WHEELS/*.whl
fi
export PYTHONPATH=adapter_store:client:kernels:proto/python:router:worker:.:$WHEELS/site

case "$1" in
kernel-tests)
	tests tests/gpu/test_kernels.py tests/gpu/test_widths.py tests/gpu/test_sampling.py \
		tests/gpu/test_repeats.py
	python3 -m tests.gpu.sanitize memcheck racecheck
	;;
engine-tests)
	tests tests/gpu --ignore tests/gpu/test_kernels.py --ignore tests/gpu/test_widths.py \
		--ignore tests/gpu/test_sampling.py --ignore tests/gpu/test_repeats.py
	;;
rates)
	bench products
	bench kernels
	bench copies --model llama-3-8b
	;;
latency)
	bench step --model llama-3-8b
	bench step --model llama-2-7b --ranks 16
	bench cold --model llama-3-8b --seconds 60
	bench start
	;;
llama-3-8b) bench engine --model llama-3-8b --adapters 0 1 200 1000 --ranks 16 ;;
llama-2-7b) bench engine --model llama-2-7b --adapters 0 1 200 --ranks 8 ;;
llama-3-8b-mixed)
	bench engine --model llama-3-8b --adapters 2000 --ranks $MIXED --alpha 0 --requests 2000
	;;
llama-2-7b-mixed)
	bench engine --model llama-2-7b --adapters 200 --ranks $MIXED
	bench engine --model llama-2-7b --adapters 2000 --ranks $MIXED --alpha 0 --requests 2000
	;;
esac
