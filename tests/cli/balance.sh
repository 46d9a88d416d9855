#!/bin/sh
# clmoe balance: the chart, the CSV file, and what the controller does; refused command lines.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)

# balance CODE MODEL OPTION...: on the model's recorded input.
balance() {
    code=$1 model=$2
    shift 2
    # shellcheck disable=SC2046,SC2086
    run_exit "$code" balance $(block_args "$model" model.layers.0.mlp) $device "$@"
}

# column N: that column of the CSV file, without its title.
column() {
    cut -d, -f"$1" "$tmp/$model.csv" | tail -n +2
}

for model in qwen3_moe deepseek_v3 longcat_flash gpt_oss; do
    balance 0 $model --controller bias --gamma 0.01 --steps 60 --csv "$tmp/$model.csv"
    grep -q '^MaxVio    first [0-9.]*, last [0-9.]*, least' "$tmp/out" || complain "$model: no summary"
    [ "$(grep -c ' |' "$tmp/out")" = 12 ] || complain "$model: no chart of 12 rows"
    [ "$(wc -l <"$tmp/$model.csv")" = 61 ] || complain "$model: not a line per step"
    [ "$(column 1 | tail -1)" = 59 ] || complain "$model: the last step is not 59"
    least=$(column 2 | sort -g | head -1) first=$(column 2 | head -1)
    awk "BEGIN { exit !($least < 0.75 * $first) }" || complain "$model: MaxVio $first stays $least"
done

# Without a controller, or with the rate 0, nothing moves; the proportional one moves too.
for options in "--controller none" "--gamma 0"; do
    rm -f "$tmp/qwen3_moe.csv"
    model=qwen3_moe
    # shellcheck disable=SC2086
    balance 0 $model $options --steps 5 --csv "$tmp/$model.csv"
    [ "$(column 2 | sort -u | wc -l)" = 1 ] || complain "$options: MaxVio changes"
done
rm -f "$tmp/qwen3_moe.csv"
balance 0 qwen3_moe --controller proportional --gamma 0.01 --steps 20 --csv "$tmp/qwen3_moe.csv"
[ "$(column 2 | sort -u | wc -l)" -gt 1 ] || complain "proportional: MaxVio stays"
balance 0 qwen3_moe --steps 1

# moves MODEL STEPS SHARE OPTION...: the report names the rule; MaxVio ends below SHARE of its first.
moves() {
    model=$1 steps=$2 share=$3
    shift 3
    rm -f "$tmp/$model.csv"
    balance 0 "$model" --steps "$steps" --csv "$tmp/$model.csv" "$@"
    first=$(column 2 | head -1) last=$(column 2 | tail -1)
    awk "BEGIN { exit !($last < $share * $first) }" || complain "$*: MaxVio $first ends at $last"
}
moves qwen3_moe 5 0.5 --controller quantile
grep -q '; controller quantile$' "$tmp/out" || complain "no quantile in the report, or a rate"
moves glm4_moe 5 0.5 --controller quantile
moves qwen3_moe 60 0.75 --controller smebu --gamma 0.01
grep -q 'controller smebu, gamma 0.01, kappa 2, beta 0.5$' "$tmp/out" || complain "no smebu"
# Without momentum and for small kappa it is the proportional rule, centred, which moves no share.
moves qwen3_moe 20 1 --controller smebu --gamma 10 --kappa 0.001 --beta 0
cp "$tmp/qwen3_moe.csv" "$tmp/smebu.csv"
moves qwen3_moe 20 1 --controller proportional --gamma 0.01 --centred delta
grep -q 'gamma 0.01, centred delta$' "$tmp/out" || complain "no centred delta"
cmp -s "$tmp/smebu.csv" "$tmp/qwen3_moe.csv" || complain "smebu is not proportional"
# A group per expert is the rule of single experts; two groups move otherwise.
moves qwen3_moe 60 0.75 --controller bias --gamma 0.01
cp "$tmp/qwen3_moe.csv" "$tmp/bias.csv"
moves qwen3_moe 60 0.75 --controller device --device-groups 16 --gamma 0.01
cmp -s "$tmp/bias.csv" "$tmp/qwen3_moe.csv" || complain "device with E groups is not bias"
moves qwen3_moe 60 9 --controller device --device-groups 2 --gamma 0.01 --centred bias
grep -q 'gamma 0.01, 2 device groups, centred bias$' "$tmp/out" || complain "no device groups"
cmp -s "$tmp/bias.csv" "$tmp/qwen3_moe.csv" && complain "device with 2 groups is bias"

# refused PATTERN OPTION...: exit 2 with one sentence that has the pattern.
refused() {
    pattern=$1
    shift
    balance 2 qwen3_moe "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout: $*"
}
refused "'sign'" --controller sign
refused "'-1'" --gamma -1
refused "'nan'" --gamma nan
refused "'0'" --steps 0
refused "exists already" --csv "$tmp/qwen3_moe.csv"
refused "$tmp/none/x.csv" --csv "$tmp/none/x.csv"
refused "unknown option" --expect x
refused "'more'" more
refused "'1x'" --layer 1x
# In the place of the device under test.
under_test=$device device=
refused "device is 99" --device 99
device=$under_test

refused "tensor is given twice" --tensor z
refused "controller none" --controller none --gamma 1
refused "controller quantile, which has no rate" --controller quantile --gamma 1
refused "centred .*controller quantile" --controller quantile --centred bias
refused "centred .*controller none" --controller none --centred delta
refused "centred none has no effect with --controller smebu" --controller smebu --centred none
refused "centred delta has no effect with --controller smebu" --controller smebu --centred delta
refused "kappa .*controller bias" --kappa 1
refused "beta .*controller device" --controller device --device-groups 2 --beta 0.1
refused "device-groups .*controller smebu" --controller smebu --device-groups 2
refused "controller device needs --device-groups" --controller device
refused "device-groups is 3, but the model's 16 experts" --controller device --device-groups 3
refused "device-groups is '0'" --controller device --device-groups 0
refused "centred is 'mean'" --centred mean
refused "kappa is 0" --controller smebu --kappa 0
refused "beta is 1" --controller smebu --beta 1
# Routers that the quantile rule is not for.
unfit() {
    balance 2 "$1" --controller quantile
    grep -q "controller is 'quantile', but the model's router $2" "$tmp/err" || complain "$1: no '$2'"
}
unfit deepseek_v3 "has 4 groups"
unfit longcat_flash "has [0-9]* identity experts"
unfit gpt_oss "chooses by logits"
mkdir "$tmp/all"
cp "$DATA"/qwen3_moe/* "$tmp/all"
sed 's/"num_experts_per_tok": 4/"num_experts_per_tok": 16/' "$DATA/qwen3_moe/config.json" >"$tmp/all/config.json"
run_exit 2 balance "$tmp/all" --layer 0 --input "$DATA/qwen3_moe/activations.safetensors" \
    --tensor model.layers.0.mlp.x --controller quantile
grep -q "'quantile', but the model's router chooses 16 of 16" "$tmp/err" || complain "K = E is not refused"

# file_error PATTERN LAYER INPUT TENSOR: exit 2, the sentence has the pattern.
file_error() {
    run_exit 2 balance "$DATA/qwen3_moe" --layer "$2" --input "$3" --tensor "$4"
    grep -q -e "$1" "$tmp/err" || complain "no '$1' in the sentence"
}
recorded=$DATA/qwen3_moe/activations.safetensors
file_error "layer 7 has no MoE" 7 "$recorded" x
file_error "no tensor 'z'" 0 "$recorded" z
file_error "$tmp/none" 0 "$tmp/none/x.safetensors" x

# The same as JSON.
model=qwen3_moe
rm -f "$tmp/$model.csv"
balance 0 $model --steps 7 --csv "$tmp/$model.csv" --json
grep -o '"max_violation":[0-9.e+-]*' "$tmp/out" | cut -d: -f2 >"$tmp/json"
[ "$(wc -l <"$tmp/json")" = 7 ] || complain "not seven steps in the JSON"
column 2 | paste - "$tmp/json" | awk '{ d = $1 - $2; if (d > 1e-6 || d < -1e-6) exit 1 }' ||
    complain "the JSON has other values than the CSV"

# Its controller: what it has, and no rate where there is none.
balance 0 $model --steps 1 --json --controller smebu --kappa 3
grep -q '"controller":"smebu","gamma":0.001[0-9]*,"centred":"none","kappa":3.0,"beta":0.5' "$tmp/out" ||
    complain "no smebu in the JSON"
balance 0 $model --steps 1 --json --controller quantile
grep -q '"controller":"quantile","gamma":null,"steps"' "$tmp/out" || complain "quantile has a rate"

# missing WHAT ARGUMENT...: the sentence says what is not there.
missing() {
    what=$1
    shift
    run_exit 2 balance "$@"
    grep -q -e "$what is missing" "$tmp/err" || complain "no '$what is missing'"
}
missing MODEL_DIR
missing --layer "$DATA/qwen3_moe"
missing --input "$DATA/qwen3_moe" --layer 0
missing --tensor "$DATA/qwen3_moe" --layer 0 --input "$tmp/none"
run_exit 2 balance "$tmp/none" --layer 0 --input "$tmp/none" --tensor x
grep -q "$tmp/none" "$tmp/err" || complain "no directory in the sentence"

# No tokens: no load, and nothing moves.
write_file "{$(entry none 0 0 '[0,48]')}"
model=empty
# shellcheck disable=SC2086
run_exit 0 balance "$DATA/qwen3_moe" --layer 0 --input "$input" --tensor none --steps 3 \
    --csv "$tmp/$model.csv" $device
[ "$(column 2 | tr '\n' ' ')" = "0 0 0 " ] || complain "no tokens: MaxVio is not 0"
grep -q ' 0 tokens' "$tmp/out" || complain "no tokens in the report"
finish
