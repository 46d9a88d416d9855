#!/bin/sh
# Coded checkpoints: refused without --decode, by name; with it the outputs that their writer gives.
set -eu
. "$(dirname "$0")/lib.sh"
coded=$(dirname "$DATA")/coded
device=$(device_option)

# run_coded CODE MODEL OPTION...: y of its file is what is expected.
run_coded() {
    want=$1
    model=$2
    shift 2
    # shellcheck disable=SC2086
    run_exit "$want" run "$coded/$model" --layer 0 --input "$coded/$model/expected.safetensors" \
        --tensor x --expect y $device "$@"
}

# has TEXT FILE: the output, or the errors, have it.
has() {
    grep -q -e "$1" "$tmp/$2" || complain "no '$1' in $2"
}

for directory in "$coded"/*/; do
    model=$(basename "$directory")
    case $model in fp8*) format=FP8 ;; *) format=MXFP4 ;; esac
    run_coded 2 "$model"
    has "tensor 'model.layers.0.*' is $format, which clmoe does not compute with.*--decode" err
    for engine in ref cpu; do
        run_coded 0 "$model" --decode f32 --json --engine "$engine"
        has "\"coded\":\"$format\",\"decoded_to\":\"f32\"" out
        echo "$model $engine: relative error $(number relative_error)"
    done
    run_coded 0 "$model" --decode bf16 --engine ref
    has "^weights   $format, decoded to bf16$" out
    run_coded 0 "$model" --decode f16 --dtype f16 --engine ref
done

run_coded 2 fp8_f32 --decode f64
has "decode is 'f64', but must be f32, f16 or bf16" err

# A model that is not coded runs as without.
block=$(recorded_blocks mixtral)
# shellcheck disable=SC2046,SC2086
run_exit 0 run $(block_args mixtral "$block") --expect "$block.y" --decode bf16 --tolerance 1e-5 --json $device
has '"coded":null,"decoded_to":null' out
finish
