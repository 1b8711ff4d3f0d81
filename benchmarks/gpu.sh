#!/usr/bin/env bash
# Builds the CUDA kernels, holds the laws on them, and measures them: at most 9 minutes on one GPU, without a network.
#
#   benchmarks/gpu.sh FOLDER [DEVICE]
#
# Runs from a checkout with whatever python3 has torch; installs nothing. FOLDER gets laws, ops-*, step-* and fused-* as
# .json and .md, with the commit, the GPU and the versions. Each part has its own time limit, and one that fails does
# not stop the others, but the exit code then is 1. DEVICE cpu tries the script itself out on tiny sizes.
set -uo pipefail
folder=$(realpath -m "${1:?benchmarks/gpu.sh FOLDER [DEVICE]}") device=${2:-cuda}
cd "$(dirname "${BASH_SOURCE[0]}")/.." && mkdir -p "$folder" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" || failed+=("$name (exit $?)")
  echo "== $name: $((SECONDS - begin)) s"
}

build='import sys, torch
from infctx.ops import build
cuda = sys.argv[1] == "cuda"
print(build.build_cuda(torch.cuda.get_device_capability()) if cuda else build.build_cpu())'
ops=(python3 benchmarks/ops.py --device "$device" --out "$folder")
step=(python3 benchmarks/step.py --device "$device" --out "$folder")
fused=(python3 benchmarks/fused.py --device "$device" --out "$folder")

if [ "$device" = cuda ]; then
  size=(--batch 8 --tokens 4096 --width 1024 --layers 24 --precision bf16) # 0.4 B parameters
  step+=("${size[@]}" --vocab 65536 --kernels cuda)
  fused+=("${size[@]}")
  large=(--batch 8 --tokens 4096 --heads 64) long=(--batch 1 --tokens 32768 --heads 64) both=(--dtype bf16 fp32)
  # Triton tries many configurations of each kernel of flash-linear-attention. That takes minutes, is kept on disk, and
  # needs one core each while nvcc compiles.
  for op in wkv7 wkv6; do
    for dtype in bf16 fp32; do
      timeout --kill-after=5 240 python3 benchmarks/ops.py --device cuda --op $op --dtype $dtype "${large[@]}" \
        --kernels fla fla-layer --rounds 0 >/dev/null 2>&1 &
    done
  done
else
  large=(--batch 2 --tokens 64 --heads 2 --rounds 1) long=(--tokens 128 --heads 2 --rounds 1) both=(--dtype bf16 fp32)
  step+=(--tokens 64 --layers 1 --width 128 --rounds 1)
  fused+=(--tokens 64 --layers 1 --width 128 --rounds 1)
fi

part build 130 python3 -c "$build" "$device"
part laws 110 python3 tests/cuda_laws.py --device "$device" --out "$folder"
wait
part "many sequences" 110 "${ops[@]}" "${large[@]}" "${both[@]}"
part "one long sequence" 80 "${ops[@]}" "${long[@]}" "${both[@]}"
part "training step" 80 "${step[@]}"
part neighbours 30 "${fused[@]}"

ls "$folder"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
