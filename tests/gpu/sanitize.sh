#!/usr/bin/env bash
# The kernels of csrc/ under compute-sanitizer: bad accesses, races and misused barriers.
# Needs a GPU and the compiled part. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# One allocation per tensor: torch's pool would hide what runs past the end of one.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Every branch of each kernel, in few cases: the tools slow kernels down many times.
tests=(tests/gpu/test_native_{merge,pack,put}.py)
select='in_place or beside or no_say or bit_for_bit or sixteen or every_element
  or (weighted and (128 or 7-) and (dtype0-1 or dtype0-3 or dtype0-8))'
for tool in memcheck racecheck synccheck; do
  echo "== $tool"
  options=(--tool "$tool" --error-exitcode 99 --target-processes all)
  # The statuses of CUDA calls are checked where they are made; torch probes with calls that fail.
  [[ $tool != memcheck ]] || options+=(--report-api-errors no)
  compute-sanitizer "${options[@]}" "${PYTHON:-python3}" -m pytest -q -x -p no:cacheprovider \
    -o addopts= -o timeout=0 -k "${select//$'\n'/ }" "${tests[@]}"
done
