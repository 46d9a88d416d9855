#!/bin/sh
# Every bundled checkpoint, with one engine, against the recorded outputs.
# Usage: checkpoints.sh ENGINE
set -eu
. "$(dirname "$0")/lib.sh"
engine=$1
device=$(device_option)
[ -n "$(engines_here "$engine")" ] || finish
for directory in "$DATA"/*/; do
    model=$(basename "$directory")
    for block in $(recorded_blocks "$model"); do
        # shellcheck disable=SC2046,SC2086 # options are words
        run_exit 0 run $(block_args "$model" "$block") --expect "$block.y" --json --tolerance 1e-5 \
            --engine "$engine" $device
        echo "$model $block $engine: relative error $(number relative_error)"
    done
done
finish
