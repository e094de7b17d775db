#!/bin/bash
# Measures the speed tables of a GPU, most important first. A second call with the same OUT does what
# the first had no time for (exit status 75: something is left).
#
#     tests/benchmarks/gpu_session.sh OUT [SECONDS]
#
# The first parts, three minutes of an H100, say whether `model.kernels` may be on: it is where the
# kernels are right and faster. PLATFORM=cpu tries the same commands without a GPU. $PYTHON (python3)
# needs jax for the GPU, what the package imports, and PyTorch to be compared with. Leaves JSON files
# and log.txt in OUT.
set -u
out=$(mkdir -p "${1:?usage: $0 OUT [SECONDS]}" && cd "$1" && pwd) || exit 1
limit=${2:-460}
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
log=$out/log.txt left=0

part() {  # NAME MODULE FLAGS...
    local name=$1 rest=$((limit - SECONDS))
    shift
    if ((rest < 30)); then
        echo "left: $name"
        left=1
        return
    fi
    echo "== $name: python -m $*" | tee -a "$log"
    timeout -k 5 "$rest" "${PYTHON:-python3}" -m "$@" 2>&1 | tee -a "$log"
    local status=${PIPESTATUS[0]}
    ((status == 0)) || left=1
    echo "== $name: status $status, $SECONDS s since the beginning" | tee -a "$log"
}

bench() {  # NAME FLAGS...
    local name=$1
    shift
    part "$name" resnet_flax.tools.bench --seconds=1 --out="$out/bench.json" "$@"
}

side() {  # NAME FLAGS...
    [[ -e $out/side_$1.json ]] && return
    local name=$1
    shift
    part "side $name" tests.benchmarks.side_by_side --platform="${PLATFORM:-gpu}" --seconds=0.5 \
        --out="$out/side_$name.json" "$@"
}

growth() {  # NAME FLAGS...
    local name=$1
    shift
    part "growth $name" tests.benchmarks.growth --parts="$name" --seconds=1 \
        --out="$out/growth.json" "$@"
}

{ nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
  nproc; git -C "$root" log -1 --format=%H; } >>"$log" 2>&1
ours='this package bfloat16,this package bfloat16 with kernels,PyTorch bfloat16 whole-step graph'
# In three minutes: right? how fast, beside PyTorch? several seeds? the first step?
part "kernels right" tests.benchmarks.kernel_check
side resnet20_kernels --rounds=5 --variants="$ours"
side resnet110_kernels --model=resnet110 --rounds=5 --variants="$ours"
bench seeds --models=resnet20 --dtypes=bfloat16 --parts=train --set=train.num_seeds=5
growth start --repeats=1
# And then:
bench resnet20 --models=resnet20 --dtypes=bfloat16
bench kernels --models=resnet20,resnet56,resnet110_preact --dtypes=bfloat16 --parts=train \
    --set=model.kernels=always
side resnet20_bfloat16 --variants='*bfloat16*'
bench resnet110 --models=resnet110 --dtypes=bfloat16
bench float32 --models=resnet20 --dtypes=float32
side resnet20_float32 --variants='*float32*'
bench batch1024 --models=resnet20,resnet110 --dtypes=bfloat16 --batch_sizes=1024
bench imagenet --models=resnet50 --dtypes=bfloat16
growth batch
growth depth --depth_batch=128
exit $((left ? 75 : 0))
