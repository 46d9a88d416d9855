#!/bin/sh
# Help, versions, the device list, and refused command lines.
set -eu
. "$(dirname "$0")/lib.sh"

# expect_error PATTERN ARGUMENT...: exit 2 with one sentence on stderr and nothing on stdout.
expect_error() {
    pattern=$1
    shift
    run_exit 2 "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: clmoe $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: clmoe $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout: clmoe $*"
}

for command in "" devices run balance selftest train compare trace; do
    # shellcheck disable=SC2086 # the empty command is no word
    run_exit 0 $command --help
    grep -q '^Usage: clmoe' "$tmp/out" || complain "no usage: clmoe $command --help"
    # shellcheck disable=SC2086
    run_exit 0 $command --version
    grep -qx 'clmoe [0-9]*\.[0-9]*\.[0-9]*' "$tmp/out" || complain "clmoe $command --version"
done
run_exit 0 run "$DATA/qwen3_moe" --layer 0 --help
run_exit 2
grep -q '^Usage: clmoe' "$tmp/err" || complain "no usage without a command"
expect_error "'walk'" walk

run_exit 0 devices
grep -q '^\*' "$tmp/out" || complain "no default device in the list"
run_exit 0 devices --json
grep -q '"engines"' "$tmp/out" || complain "no engines in the JSON list"
expect_error "'--jsn'; did you mean --json?" devices --jsn
expect_error "'devcies'; did you mean clmoe devices" devcies
for command in devices run balance selftest train compare trace; do
    run_exit 0 help $command
    "$CLMOE" $command --help | cmp -s - "$tmp/out" || complain "clmoe help $command is not its --help"
    run_exit 0 $command -h
done
run_exit 0 help
"$CLMOE" --help | cmp -s - "$tmp/out" || complain "clmoe help is not clmoe --help"
run_exit 0 version
grep -qx 'clmoe [0-9]*\.[0-9]*\.[0-9]*' "$tmp/out" || complain "clmoe version"
expect_error "'walk'" help walk
expect_error "'more'" help run more
expect_error "'more'" version more
expect_error "'--json=1'" devices --json=1
expect_error "'more'" devices more

mkdir "$tmp/none"
# Not every loader heeds this variable; one that does not shows the same devices as before.
"$CLMOE" devices >"$tmp/devices"
OCL_ICD_VENDORS="$tmp/none" "$CLMOE" devices >"$tmp/out" 2>"$tmp/err" || true
if ! cmp -s "$tmp/devices" "$tmp/out"; then
    export OCL_ICD_VENDORS="$tmp/none"
    expect_error 'pocl-opencl-icd' devices
    # shellcheck disable=SC2046
    expect_error 'no OpenCL platform' run $(block_args qwen3_moe model.layers.0.mlp)
    unset OCL_ICD_VENDORS
fi

model=$DATA/qwen3_moe
file=$model/activations.safetensors
x=model.layers.0.mlp.x
expect_error MODEL_DIR run
expect_error '--layer' run "$model"
expect_error '--input' run "$model" --layer 0
expect_error '--tensor' run "$model" --layer 0 --input "$file"
expect_error "needs a value" run "$model" --layer
expect_error "'other'" run "$model" other --layer 0 --input "$file" --tensor $x
good() {
    expect_error "$1" run "$model" --layer 0 --input "$file" --tensor $x "$2" "$3"
}
good "'-1'" --layer -1
good "'1x'" --layer 1x
good "''" --layer ""
good "'4294967296'" --layer 4294967296
expect_error "layer 7" run "$model" --layer 7 --input "$file" --tensor $x
good "'0'" --repeat 0
good "'1000001'" --repeat 1000001
for value in nan inf -1 -0 0x1 "" 1e 1e999 " 1" 1,5; do
    good "capacity-factor is '$value'" --capacity-factor "$value"
    expect_error "tolerance is '$value'" run "$model" --layer 0 --input "$file" --tensor $x \
        --expect $x --tolerance "$value"
done
good "device is 99" --device 99
good "'no such device'" --device "no such device"
good "''" --device ""
good "device is 4294967296" --device 4294967296
# Part of the platform's name, in any case, and of the device's.
name=$("$CLMOE" devices | sed -n 's/^    platform *//p' | head -1 | tr '[:lower:]' '[:upper:]')
# shellcheck disable=SC2046
run_exit 0 run $(block_args qwen3_moe model.layers.0.mlp) --device "$name"
name=$("$CLMOE" devices | sed -n 's/^[* ]0  \(.*\) (.*/\1/p')
# shellcheck disable=SC2046
run_exit 0 run $(block_args qwen3_moe model.layers.0.mlp) --device "$name"
grep -q "^device *$name" "$tmp/out" || complain "not the device $name"
# The report is as wide as COLUMNS says.
for columns in 40 60 100 200; do
    # shellcheck disable=SC2046
    COLUMNS=$columns run_exit 0 run $(block_args qwen3_moe model.layers.0.mlp) $(device_option)
    widest=$(grep '^ *[0-9][0-9]* *[0-9][0-9]* *#' "$tmp/out" | awk '{ if (length > most) most = length } END { print most }')
    [ "$widest" = $columns ] || complain "COLUMNS $columns: the widest bar ends at $widest"
done
good "warp" --engine warp
for loss in z:1e39 z:1e-50 switch:0x1 switch:; do
    good "loss is '$loss', whose weight is not 0 or a number" --loss "$loss"
done
good "loss is 'nope', which names no loss: switch, squared, entropy" --loss nope
good "capacity-factor is '1e-50'" --capacity-factor 1e-50
expect_error "input is ''" run "$model" --layer 0 --input "" --tensor $x
expect_error "MODEL_DIR is ''" run "" --layer 0 --input "$file" --tensor $x
good "needs --expect" --tolerance 1
good "no tensor 'z'; it has model.layers.0.mlp" --expect z
good "same file" --output "$file"
good "$tmp/none/there" --output "$tmp/none/there/y.safetensors"
expect_error "$tmp/none" run "$model" --layer 0 --input "$tmp/none/x.safetensors" --tensor $x
good "layer is given twice" --layer 0
expect_error "input_ids" run "$model" --layer 0 --input "$file" --tensor input_ids
expect_error "gate.out1" run "$model" --layer 0 --input "$file" --tensor model.layers.0.mlp.gate.out1
expect_error "$tmp/none" run "$tmp/none" --layer 0 --input "$file" --tensor $x

# A result off its expectation is exit 1, in text and in JSON.
# shellcheck disable=SC2046
run_exit 1 run $(block_args qwen3_moe model.layers.0.mlp) --expect $x $(device_option)
grep -q FAIL "$tmp/out" || complain "no FAIL in the report"
# shellcheck disable=SC2046
run_exit 1 run $(block_args qwen3_moe model.layers.0.mlp) --expect $x --json $(device_option)
grep -q '"pass":false' "$tmp/out" || complain "no \"pass\":false in the report"
# NaN is off any expectation; no tokens are fine.
write_file "{$(entry nan 0 384),$(entry zero 384 768),$(entry none 768 768 '[0,48]')}" 768
header=$(($(wc -c <"$input") - 768))
{ head -c $header "$input"; head -c 384 /dev/zero | tr '\0' '\377'; head -c 384 /dev/zero; } >"$tmp/nan"
model=$DATA/deepseek_v3
# shellcheck disable=SC2046
run_exit 1 run "$model" --layer 0 --input "$tmp/nan" --tensor nan --expect zero --json \
    --tolerance 1e30 $(device_option)
for field in '"relative_error":null' '"pass":false' '"nonfinite_tokens":2'; do
    grep -q "$field" "$tmp/out" || complain "no $field for a NaN"
done
# shellcheck disable=SC2046
run_exit 0 run "$model" --layer 0 --input "$tmp/nan" --tensor none --expect none --json \
    --output "$tmp/y.safetensors" $(device_option)
grep -q '"tokens":0' "$tmp/out" || complain "no tokens in the report"

if [ -e /dev/full ]; then
    code=0
    "$CLMOE" --help >/dev/full 2>"$tmp/err" || code=$?
    [ $code = 2 ] || complain "exit $code on a full disk"
fi
finish
