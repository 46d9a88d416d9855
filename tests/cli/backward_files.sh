#!/bin/sh
# clmoe run --backward: its files, what it finds wrong in them, and what it refuses.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)
work=$tmp/work
mkdir "$work"

# backward CODE MODEL OPTION...: on the recorded dy.
backward() {
    code=$1 model=$2
    shift 2
    # shellcheck disable=SC2046,SC2086
    run_exit "$code" run $(backward_args "$model") "$@" $device
}

# refused PATTERN OPTION...: exit 2 with one sentence that has the pattern, and nothing on stdout.
refused() {
    pattern=$1
    shift
    backward 2 qwen3_moe "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout: $*"
}

# changed FILE TENSOR COUNT BYTE: FILE with the first COUNT bytes of a tensor changed, in $work/wrong.
changed() {
    at=$(head -c 65536 "$1" | tr '{' '\n' | grep -a -A1 "\"$2\":" |
        sed -n 's/.*"data_offsets":\[\([0-9]*\),.*/\1/p' | tail -1)
    at=$((8 + $(od -An -tu4 -N4 "$1") + at))
    {
        head -c $at "$1"
        head -c "$3" /dev/zero | tr '\0' "$4"
        tail -c +$((at + $3 + 1)) "$1"
    } >"$work/wrong"
}

# What is written is found again, bit by bit: one tensor per expert, stacks, transposed stacks.
for model in deepseek_v3 granitemoe gpt_oss llama4_text; do
    file=$work/$model.safetensors
    backward 0 "$model" --gradients "$file"
    grep -q "^backward  ms" "$tmp/out" || complain "$model: no times"
    backward 0 "$model" --expect-gradients "$file" --tolerance 0 --json
    [ "$(number compared)" = "$(number tensors)" ] || complain "$model: not all tensors are written"
    [ "$(number compared)" = "$(recorded_gradients "$file")" ] || complain "$model: other tensors"
    # As many as the model has, but the selection bias, and dx.
    tensors=$(head -c 65536 "$DATA/$model/model.safetensors" | tr '{' '\n' | grep -a -c '"shape"')
    [ "$model" = deepseek_v3 ] || tensors=$((tensors + 1))
    [ "$(number compared)" = $tensors ] || complain "$model: not the tensors of the model"
    ! grep -a -q "correction_bias" "$file" || complain "$model: a selection bias has a gradient"
    backward 0 "$model" --gradients -
    cmp -s "$tmp/out" "$file" || complain "$model: other bytes on standard output"
done

# One wrong number.
tensor=grad.model.layers.0.mlp.experts.down_proj_bias
changed "$GRADIENTS/gpt_oss.safetensors" $tensor 4 B # 48.6
backward 1 gpt_oss --expect-gradients "$work/wrong"
grep -q FAIL "$tmp/out" || complain "no FAIL in the report"
grep -q "of $tensor; 7 of 7 tensors compared" "$tmp/out" || complain "not the wrong tensor"
backward 1 gpt_oss --expect-gradients "$work/wrong" --json
[ "$(number worst)" = "\"$tensor\"" ] || complain "not the wrong tensor in JSON"
grep -q '"gradients":{[^}]*"pass":false' "$tmp/out" || complain "no \"pass\":false"
backward 0 gpt_oss --expect-gradients "$work/wrong" --tolerance 1e9
# What should be 0, as of an expert without a token, is off without bound if it is not.
tensor=grad.model.layers.0.mlp.experts.0.up_proj.weight
changed "$GRADIENTS/qwen3_moe.safetensors" $tensor 6144 '\0'
backward 1 qwen3_moe --expect-gradients "$work/wrong" --tolerance 1e30 --json
[ "$(number worst)" = "\"$tensor\"" ] || complain "not the tensor that should be 0"
[ "$(number worst_error)" = null ] || complain "an error that is a number"
# And so is NaN, whatever comes after it.
changed "$GRADIENTS/qwen3_moe.safetensors" model.layers.0.mlp.dx 4 '\377'
backward 1 qwen3_moe --expect-gradients "$work/wrong" --tolerance 1e30 --json
[ "$(number worst)" = '"model.layers.0.mlp.dx"' ] || complain "not the tensor with NaN"

# Storage types have tolerances of their own; a loss changes the gradients.
for type in f16 bf16; do
    backward 0 qwen3_moe --dtype $type --expect-gradients "$GRADIENTS/qwen3_moe.safetensors"
    backward 1 qwen3_moe --dtype $type --expect-gradients "$GRADIENTS/qwen3_moe.safetensors" \
        --tolerance 1e-5
done
backward 1 qwen3_moe --loss switch:1 --expect-gradients "$GRADIENTS/qwen3_moe.safetensors"
backward 0 qwen3_moe --loss switch:0 --expect-gradients "$GRADIENTS/qwen3_moe.safetensors"

# Files: what is there stays, and is never an input or the model.
echo old >"$work/there"
refused "there' exists already; --force" --gradients "$work/there"
[ "$(cat "$work/there")" = old ] || complain "a refused file changed"
backward 0 qwen3_moe --gradients "$work/there" --force
cp "$GRADIENTS/qwen3_moe.safetensors" "$work/expect"
refused "same file as --expect-gradients" --gradients "$work/expect" --force --expect-gradients "$work/expect"
cp "$GRADIENTS/qwen3_moe.safetensors" "$work/input"
# shellcheck disable=SC2046,SC2086
run_exit 2 run $(backward_args qwen3_moe | sed "s,--input [^ ]*,--input $work/input,") \
    --gradients "$work/input" --force $device
grep -q "same file as --input" "$tmp/err" || complain "the input is an output"
cmp -s "$work/input" "$GRADIENTS/qwen3_moe.safetensors" || complain "the input changed"
refused "same file as --output" --gradients "$work/new" --output "$work/new"
cmp -s "$work/expect" "$GRADIENTS/qwen3_moe.safetensors" || complain "an input changed"
refused "is a file of the model" --gradients "$DATA/qwen3_moe/model.safetensors.index.json"
for other in json stats; do
    refused "--gradients - and --$other both write to standard output" --gradients - --$other
done
refused "both write to standard output" --gradients - --output -
[ -z "$(find "$work" -name '.clmoe-*')" ] || complain "a temporary file is left"

# What does not fit.
refused "expect-gradients is ''" --expect-gradients ""
refused "no tensor 'model.layers.0.mlp.dx'" --expect-gradients "$DATA/qwen3_moe/activations.safetensors"
write_file "{$(entry model.layers.0.mlp.dx 0 4608 '[24,48]')}" 4608
refused "has no gradient of the block's tensors" --expect-gradients "$input"
write_file "{$(entry model.layers.0.mlp.dx 0 4608 '[48,24]')}" 4608
refused "is \[48, 24\], but must be \[24, 48\]" --expect-gradients "$input"
write_file "{$(entry x 0 384),$(entry y 384 768),$(entry long.dy 768 1344 '[3,48]'),$(entry dy 1344 1728)}" 1728
tiny="$DATA/qwen3_moe --layer 0 --input $input --tensor x --backward"
# wrong_dy NAME PATTERN
wrong_dy() {
    # shellcheck disable=SC2086
    run_exit 2 run $tiny --dy "$1" $device
    grep -q -e "$2" "$tmp/err" || complain "no '$2' in the sentence"
}
wrong_dy y "--dy is 'y', which does not end in dy"
wrong_dy ldy "which does not end in dy"
wrong_dy none.dy "no tensor 'none.dy'"
wrong_dy long.dy "'long.dy' has 3 tokens, but 'x' has 2"
# shellcheck disable=SC2086
run_exit 0 run $tiny --dy dy --gradients "$work/dx" $device
grep -a -q '"dx"' "$work/dx" || complain "dx has another name"
finish
