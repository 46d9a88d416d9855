#!/bin/sh
# The backward pass of every bundled checkpoint, with one engine, against the recorded gradients.
# Usage: backward.sh ENGINE
set -eu
. "$(dirname "$0")/lib.sh"
engine=$1
device=$(device_option)
[ -n "$(engines_here "$engine")" ] || finish
models=0
for file in "$GRADIENTS"/*.safetensors; do
    model=$(basename "$file" .safetensors)
    case $model in gpt_oss | llama4_text | qwen2_moe) more=--recompute ;; *) more= ;; esac
    for option in "" $more; do
        # shellcheck disable=SC2046,SC2086 # options are words
        run_exit 0 run $(backward_args "$model") --expect-gradients "$file" --json \
            --engine "$engine" $device $option
        echo "$model $engine $option: relative error $(number worst_error)"
        [ "$(number compared)" = "$(recorded_gradients "$file")" ] ||
            complain "$model: other tensors are compared than were recorded"
        grep -q '"gradients":{[^}]*"tolerance":2e-5' "$tmp/out" || complain "$model: another tolerance"
    done
    models=$((models + 1))
done
[ $models = "$(find "$DATA" -mindepth 1 -maxdepth 1 -type d | wc -l)" ] || complain "$models models"
finish
