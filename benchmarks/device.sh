#!/bin/sh
# Test and measure on this machine's GPU: sh benchmarks/device.sh PART [results directory]
#
# Each part takes less than ten minutes on an H200. `wheels` runs where a package index can be
# reached; the other parts take from its folder what a machine with only torch and triton lacks.
set -eu
cd "$(dirname "$0")/.."
PARTS="wheels kernel-tests engine-tests tp-tests rates tune-products latency llama-3-8b llama-3-8b-mixed llama-2-7b llama-2-7b-mixed"
PARTS="$PARTS live cold-tiers ablation ablation-invariant ablation-launches fused merged packed peft paper-7b paper-13b"
PARTS="$PARTS tp-rates tp-bench tp-bench-30b tp-bench-70b"
PACKAGES="cffi crc32c cryptography cyclopts docstring_parser execnet googleapis-common-protos
	grpcio-health-checking grpcio-reflection grpcio-status msgspec prometheus_client pytest-xdist redis
	rich-rst"
PEFT_PACKAGES="accelerate anyio filelock fsspec h11 hf-xet httpcore2 httpx2 huggingface_hub idna packaging
	peft psutil pyyaml regex safetensors tokenizers tqdm transformers truststore"
WHEELS=.carry/wheels
PEFT_WHEELS=.carry/peft
REDIS=.carry/redis-server
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

download() {
	rm -rf "$1"
	directory=$1
	shift
	.venv/bin/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
		--constraint constraints-cpu.txt --dest "$directory" "$@"
}

unpack() {
	if [ -d "$1" ]; then
		python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$1/site" "$1"/*.whl
	fi
}

case " $PARTS " in
*" ${1:-none} "*) ;;
*)
	echo "usage: sh benchmarks/device.sh PART [results directory]; PART is one of: $PARTS" >&2
	exit 2
	;;
esac
if [ "$1" = wheels ]; then
	download $WHEELS $PACKAGES
	download $PEFT_WHEELS $PEFT_PACKAGES
	sh tests/support/get_redis.sh $REDIS debian
	exit
fi
unpack $WHEELS
export PYTHONPATH=adapter_store:client:kernels:proto/python:router:worker:.:$WHEELS/site
case "$1" in
*-tests | peft)
	unpack $PEFT_WHEELS
	PYTHONPATH=$PYTHONPATH:$PEFT_WHEELS/site
	;;
esac

case "$1" in
kernel-tests)
	tests --numprocesses 8 tests/gpu/test_kernels.py tests/gpu/test_widths.py tests/gpu/test_sampling.py \
		tests/gpu/test_repeats.py tests/gpu/test_rank_sum.py tests/gpu/test_products.py
	python3 -m tests.gpu.sanitize memcheck racecheck
	;;
engine-tests)
	tests tests/gpu --ignore tests/gpu/test_kernels.py --ignore tests/gpu/test_widths.py \
		--ignore tests/gpu/test_sampling.py --ignore tests/gpu/test_repeats.py \
		--ignore tests/gpu/test_rank_sum.py --ignore tests/gpu/test_products.py \
		--ignore tests/gpu/test_tensor_parallel.py
	;;
tp-tests) # on two GPUs; a rank that fails or hangs leaves both ranks' tracebacks
	tests tests/gpu/test_tensor_parallel.py --capture=no --maxfail=3 -o faulthandler_timeout=90
	;;
tp-rates) bench collectives ;; # on two GPUs: 60 s
tp-bench) # on two GPUs: four engines of 63 to 79 s
	for ranks in "--lora replicated" "--lora slora" "--lora silent" "--tensor-parallel 1"; do
		bench tensor_parallel $ranks --requests 500 --max-running 512 --batch 64 --limit-s 135
	done
	;;
tp-bench-30b) # on two GPUs of 78 GiB; one of them has no room for its 65 GB and a pool
	for lora in replicated slora silent; do
		bench tensor_parallel --model llama-30b --max-context-tokens 2048 --requests 100 --lora $lora
	done
	;;
tp-bench-70b) # on two H200, 100 s each: 141 GB of weights do not fit into two GPUs of 78 GiB
	for lora in replicated slora silent; do
		bench tensor_parallel --model llama-3-70b --ranks 16 --requests 100 --batch 16 64 --limit-s 190 \
			--lora $lora
	done
	;;
rates)
	bench products
	bench kernels
	bench copies --model llama-3-8b
	;;
tune-products) # 35 s a model; changes the worker's table, of which another directory gets a copy
	bench tune_products
	[ -z "${2:-}" ] || cp worker/lorry/worker/product_algorithms.json "$2"
	;;
latency)
	bench step --model llama-3-8b
	bench step --model llama-2-7b --ranks 16
	bench step --model llama-3-8b --batch 1 --context 4096 --adapters 0 1 --ranks 16 \
		--max-context-tokens 8192
	bench cold --model llama-3-8b --seconds 60
	bench start
	;;
live) # start, 1,000 page images of 27 MiB, capacity, three loads of 45 s: four to five minutes
	mount -o remount,size=48g /dev/shm || echo "fewer page images may have room in /dev/shm"
	bench live
	;;
cold-tiers) # two starts, and 43 adapters of 80 MiB onto the disk and into a Redis
	bench cold_tiers
	PATH="$PWD/$(dirname $REDIS):$PATH"
	bench cold_tiers --redis
	;;
# Times below are of an H200, a minute of start left out, as the simulator and the rates have them.
ablation) # five variants, three runs of 13 s
	bench ablation --variants "split pool" "padded ranks" "no prefetch" "no overlap"
	;;
ablation-invariant) # a second capture of all steps, and six runs of 7 to 15 s
	bench ablation --requests 250 --pool-gib 12 --variants batch-invariant
	;;
ablation-launches) # two runs: 6 s, 20 s without graphs, 105 s of padded products
	bench ablation --requests 125 --pool-gib 6 --runs 2 --variants "no graphs" "padded products"
	;;
fused) # two engines, each with two captures of all steps; ten cases of ten runs, six runs of 7 s
	bench fused --model llama-3-8b
	bench ablation --requests 250 --pool-gib 12 --variants unfused
	;;
merged) # three numbers of adapters, each three runs of merged copies and of one engine: four minutes
	bench baselines.merged --model llama-3-8b
	;;
packed) # eleven engines to build, six cases of three runs: seven minutes
	bench baselines.packed --model llama-3-8b --requests 500
	;;
peft) # 60 s each for one adapter a batch and for mixed batches, and as much to make the adapters
	bench baselines.peft --model llama-2-7b --adapters 200 --ranks 8 --seconds 60
	;;
paper-7b) bench reproduction --settings s1 s2 ;; # 16 cells of 20 s and their drains of about 8 s
paper-13b) bench reproduction --settings s4 ;; # 12 cells
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
