#!/bin/sh
# A call of OpenCL fails under the tool: exit 2 with one sentence, or, where it can do without, success.
# The argument is the layer of tests/fault.
set -eu
. "$(dirname "$0")/lib.sh"
export OPENCL_LAYERS="$1" XDG_CACHE_HOME="$tmp/cache"

# The call that fails, and whether all after it do.
refused=0
fails() {
    CLMOE_FAULT_CALL=$call
    CLMOE_FAULT_LASTING=$lasting
    export CLMOE_FAULT_CALL CLMOE_FAULT_LASTING
    code=0
    "$CLMOE" "$@" >"$tmp/out" 2>"$tmp/err" || code=$?
    case $code in
    0) ;;
    2)
        refused=$((refused + 1))
        grep -q '^clmoe' "$tmp/err" || complain "no sentence: call $call, lasting $lasting: clmoe $*"
        ;;
    *) complain "exit $code: call $call, lasting $lasting: clmoe $*" ;;
    esac
}

for lasting in 0 1; do
    call=1
    while [ $call -lt 900 ]; do
        # shellcheck disable=SC2046
        fails run $(block_args qwen2_moe model.layers.0.mlp) --no-cache --output "$tmp/y" --force --loss l1
        # shellcheck disable=SC2046
        fails balance $(block_args deepseek_v3 model.layers.0.mlp) --no-cache --steps 2
        # Few calls in a row, then fewer: chains of kernels look alike.
        call=$((call + 1 + call / 16))
    done
    for call in $(seq 1 50); do
        fails devices
        fails devices --json
    done
done
echo "$refused runs refused"
[ $refused -gt 50 ] || complain "only $refused runs refused"
finish
