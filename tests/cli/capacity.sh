#!/bin/sh
# Capacity factor 0.5 on the bundled checkpoints, with more than two engines 1 too, and on one also 0
# (dropless), as checkpoints.sh has them all without a capacity: every pair is kept or dropped, and every engine, where there are two,
# gives the same result. Usage: capacity.sh COMPARE ENGINE...
set -eu
. "$(dirname "$0")/lib.sh"
compare=$1
shift
device=$(device_option)
engines=$(engines_here "$@")

check_counts() {
    pairs=$(($(number tokens) * $(number top_k)))
    kept=$(number kept_total) dropped=$(number dropped_total)
    [ $((kept + dropped)) = $pairs ] || complain "$1: kept $kept + dropped $dropped is not $pairs"
    [ "$2" != 0 ] || [ "$dropped" = 0 ] || complain "$1: dropless, but dropped $dropped"
    [ "$2" != 0.5 ] || [ "$dropped" -gt 0 ] || complain "$1: factor 0.5, but nothing dropped"
}

for directory in "$DATA"/*/; do
    model=$(basename "$directory")
    block=$(recorded_blocks "$model" | head -1)
    factors=0.5
    [ $# -le 2 ] || factors="1.0 0.5"
    [ "$model" != mixtral ] || factors="1.0 0.5 0"
    for factor in $factors; do
        counts=
        for engine in $engines; do
            what="$model, factor $factor, $engine"
            # shellcheck disable=SC2046,SC2086
            run_exit 0 run $(block_args "$model" "$block") --capacity-factor $factor --engine "$engine" \
                --json --output "$tmp/$engine.safetensors" --force $device
            check_counts "$what" $factor
            counts="$counts$(grep -o '"dropped":\[[^]]*' "$tmp/out")
"
        done
        [ "$(printf '%s' "$counts" | sort -u | wc -l)" = 1 ] ||
            complain "$model, factor $factor: engines drop differently"
        [ "$(printf '%s\n' "$engines" | wc -w)" -gt 1 ] || continue
        # shellcheck disable=SC2046
        "$compare" 1e-5 $(printf "$tmp/%s.safetensors " $engines) >"$tmp/err" 2>&1 ||
            complain "$model, factor $factor: engines differ"
    done
done
finish
