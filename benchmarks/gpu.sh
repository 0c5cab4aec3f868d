#!/usr/bin/env bash
# What is to be measured on a GPU, in two parts of less than ten minutes:
#     bash benchmarks/gpu.sh train [FOLDER]      training steps beside PEFT
#     bash benchmarks/gpu.sh kernels [FOLDER]    products with a quantized weight, and tests
# Each step has a limit of seconds, and what it printed until then stays in FOLDER/NAME.log; a
# finished one leaves FOLDER/gpu_NAME.json too.
set -u
cd "$(dirname "$0")/.."
part=${1:-}
case $part in train | kernels) ;; *) echo "give the part, train or kernels" >&2; exit 2 ;; esac
out=${2:-outputs/gpu}
mkdir -p "$out"
# JAX would take most of the memory, which torch needs as well.
export PYTHONPATH=.:${PYTHONPATH:-} PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

step() {  # name, seconds, command
    echo "== $1: $(date +%T)"
    timeout "$2" "${@:3}" >"$out/$1.log" 2>&1
    local status=$? made=benchmarks/results/gpu_$1.json
    echo "== $1: status $status"
    tail -n 3 "$out/$1.log"
    # Only what this run has written: the repository holds an older one.
    if [ $status = 0 ] && [ "$made" -nt "$out/card.log" ]; then cp "$made" "$out/"; fi
}

nvidia-smi >"$out/card.log"
if [ "$part" = train ]; then
    step check 90 python3 benchmarks/gpu_check.py
    step train 480 python3 benchmarks/gpu_train.py
else
    step kernels 150 python3 benchmarks/gpu_kernels.py
    step quant 180 python3 benchmarks/gpu_quant.py
    # The other tests need the eight devices that a CPU can pretend to be.
    step tests 90 env JAX_PLATFORMS=cuda,cpu python3 -m pytest -q -n 0 -m "not slow" \
        tests/quant/test_formats.py tests/quant/test_transform.py
fi
