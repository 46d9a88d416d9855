#!/bin/sh
# What `clmoe train` leaves: names, shapes and values of model.safetensors and config.json, against a
# forward pass in double precision, and one layer of it by `clmoe run`.
# Usage: exported.sh EXPORTED
set -eu
. "$(dirname "$0")/lib.sh"
exported=$1
device=$(device_option)
# shellcheck disable=SC2154 # tmp is lib.sh's
cat "$(dirname "$0")"/../../docs/*.md >"$tmp/text"
batch=64 sequence=32

tiny="--text $tmp/text --dim 32 --hidden 32 --experts 4 --save-every 3 --warmup 2 --lr 0.02 --batch $batch
    --sequence $sequence --engine ref $device"

# train NAME OPTION...: a tiny model, to $tmp/NAME
train() {
    name=$1
    shift
    # shellcheck disable=SC2086 # options are words
    run_exit 0 train $tiny --steps 6 --out "$tmp/$name" "$@"
}

# check NAME MODEL_TYPE: the family, and its loss as the run gave it.
check() {
    "$exported" "$tmp/$1" "$tmp/text" $batch $sequence "$tmp/$1.rows" >"$tmp/loss" 2>"$tmp/err" ||
        complain "$1: the files are not right"
    given=$(tail -1 "$tmp/$1/metrics.csv" | cut -d, -f3)
    awk -v type="$2" -v given="$given" '
        { error = ($2 - given) / given; print $0 ", the run gave " given }
        END { exit !(NR == 1 && $1 == type && given > 0 && error < 2e-5 && error > -2e-5) }' "$tmp/loss" ||
        complain "$1 is no $2, or its loss is off"
}

# layer CODE NAME OPTION...: clmoe run of the second layer.
layer() {
    code=$1 name=$2
    shift 2
    # shellcheck disable=SC2086
    run_exit "$code" run "$tmp/$name" --layer 1 --input "$tmp/${rows-$name}.rows" --tensor x.1 \
        --expect y.1 --engine ref $device "$@"
}

train mixtral --context 3
check mixtral mixtral
layer 0 mixtral

train one --context 1 --top-k 1
check one qwen3_moe
layer 0 one

train shared --context 1 --top-k 1 --shared 32
check shared qwen2_moe
layer 0 shared

train biased --context 1 --balance bias:0.05 --shared 32
check biased ernie4_5_moe
layer 0 biased

# No family has it; clmoe can be told.
train own --context 1 --top-k 1 --balance bias:0.05 --shared 32
check own clmoe_train
layer 2 own
layer 0 own --assume pattern

# Nor this, and clmoe run neither.
train sinkhorn --context 1 --balance sinkhorn:3
layer 2 sinkhorn --assume pattern
grep -q router_methods "$tmp/err" || complain "sinkhorn is not what refuses"

# Edits are noticed: gate and up exchanged; weights divided; half a file.
cp -r "$tmp/mixtral" "$tmp/edited"
rows=mixtral
sed 's/\.w1\./.w9./g; s/\.w3\./.w1./g; s/\.w9\./.w3./g' "$tmp/mixtral/model.safetensors" \
    >"$tmp/edited/model.safetensors"
layer 1 edited
head -c 9000 "$tmp/mixtral/model.safetensors" >"$tmp/edited/model.safetensors"
layer 2 edited
cp -r "$tmp/one" "$tmp/divided"
rows=one
sed 's/\("norm_topk_prob": \)false/\1true/' "$tmp/one/config.json" >"$tmp/divided/config.json"
layer 1 divided

# A run that is over writes them anew; a full disk leaves what there was.
cp -r "$tmp/mixtral" "$tmp/before"
for file in model.safetensors config.json; do
    ln -s /dev/full "$tmp/mixtral/$file.tmp"
    run_exit 2 train --resume "$tmp/mixtral"
    grep -q "$file.* cannot be written: No space left on device" "$tmp/err" || complain "another error"
    cmp "$tmp/before/$file" "$tmp/mixtral/$file" || complain "$file is not as it was"
    [ ! -L "$tmp/mixtral/$file.tmp" ] || complain "$file.tmp is left"
done

# A config.json of another model goes before the tensors that are not its.
echo '{"model_type": "qwen3_moe"}' >"$tmp/mixtral/config.json"
rm "$tmp/mixtral/model.safetensors"
ln -s /dev/full "$tmp/mixtral/model.safetensors.tmp"
run_exit 2 train --resume "$tmp/mixtral"
[ ! -e "$tmp/mixtral/config.json" ] || complain "the config.json of another model is left"
run_exit 0 train --resume "$tmp/mixtral"
for file in model.safetensors config.json; do
    cmp "$tmp/before/$file" "$tmp/mixtral/$file" || complain "$file is another one"
done

# Stopped where K is still 1: the model is of that K.
# shellcheck disable=SC2086
"$CLMOE" train $tiny --context 1 --steps 100000 --top-k-schedule 1:99999,2 --out "$tmp/stopped" \
    >"$tmp/out" 2>"$tmp/err" &
code=0 tool=$! waited=0
until [ -s "$tmp/stopped/metrics.csv" ] && [ "$(wc -l <"$tmp/stopped/metrics.csv")" -gt 2 ]; do
    waited=$((waited + 1))
    [ $waited -lt 300 ] || break
    sleep 0.2
done
kill -TERM $tool
wait $tool || code=$?
[ $code = 143 ] || complain "exit $code after SIGTERM"
"$exported" "$tmp/stopped" "$tmp/text" $batch $sequence "$tmp/rows" >"$tmp/loss" 2>"$tmp/err" ||
    complain "a stopped run's files are not right"
grep -q '^qwen3_moe' "$tmp/loss" || complain "a stopped run's model is of another K"
finish
