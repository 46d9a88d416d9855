#!/bin/sh
# clmoe run --stats and --loss: tables and values that follow from the counts in the JSON report.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)

# run CODE MODEL OPTION...: on the model's recorded input.
run() {
    code=$1 model=$2
    shift 2
    # shellcheck disable=SC2046,SC2086
    run_exit "$code" run $(block_args "$model" model.layers.0.mlp) "$@" $device
}

# counts NAME: that array of the JSON report, a line per column.
counts() {
    grep -o "\"$1\":\[[^]]*" "$tmp/out" | sed 's/.*\[//' | tr , '\n'
}

# column N: that column of the table by expert.
column() {
    sed -n '/^expert  *load/,/^$/p' "$tmp/out" | awk -v n="$1" 'NR > 1 && NF > 1 { print $n }'
}

# field NAME WANT: a line of the statistics.
field() {
    grep -q "^$1 *$2\$" "$tmp/out" || complain "$model: $1 is not $2"
}

for model in qwen3_moe longcat_flash; do
    run 0 "$model" --capacity-factor 0.5 --json
    for name in load kept dropped; do
        counts $name >"$tmp/$name"
    done
    pairs=$(($(number tokens) * $(number top_k))) kept=$(number kept_total) dropped=$(number dropped_total)
    idle=$(number idle_experts) tokens=$(number tokens)
    run 0 "$model" --capacity-factor 0.5 --stats
    field tokens "$tokens"
    field pairs "$pairs"
    field kept "$kept"
    field dropped "$dropped"
    field idle_experts "$idle"
    field columns "$(wc -l <"$tmp/load" | tr -d ' ')"
    n=2
    for name in load kept dropped; do
        column $n >"$tmp/column"
        cmp -s "$tmp/column" "$tmp/$name" || complain "$model: the column of $name is not that of --json"
        n=$((n + 1))
    done
    [ "$(column 1 | tail -1)" = $(($(wc -l <"$tmp/load") - 1)) ] || complain "$model: a row per column"
done
# The same statistics as JSON.
for options in "" "--capacity-factor 0.5"; do
    # shellcheck disable=SC2086
    run 0 qwen3_moe --stats $options
    sed -n 's/^\([a-z_0-9]*\)  *\([-0-9.e+naif]*\)$/\1 \2/p' "$tmp/out" | sort >"$tmp/fields"
    # shellcheck disable=SC2086
    run 0 qwen3_moe --stats --json $options
    sed 's/.*"statistics":{\([^{]*\),"experts".*/\1/' "$tmp/out" | tr -d '"' | tr ',:' '\n ' | sort >"$tmp/json"
    [ "$(wc -l <"$tmp/fields")" -gt 25 ] || complain "no fields in the text"
    join "$tmp/fields" "$tmp/json" >"$tmp/joined"
    [ "$(wc -l <"$tmp/joined")" = "$(wc -l <"$tmp/fields")" ] || complain "--json lacks statistics"
    awk '{ d = $2 - $3; s = $2 < 0 ? -$2 : $2; if (d < 0) d = -d; if (d > 1e-5 * s + 1e-9) { print; bad = 1 } } END { exit bad }' \
        "$tmp/joined" >"$tmp/err" || complain "--json has other statistics than the text"
    grep -q '"experts":{"load":\[' "$tmp/out" || complain "no arrays by expert"
done

# value KIND: of a loss in the JSON report.
value() {
    grep -o "\"kind\":\"$1\"[^}]*" "$tmp/out" | sed 's/.*"value"://'
}

# near WANT KIND: whether a loss has the value that the counts give.
near() {
    got=$(value "$2")
    awk "BEGIN { d = $1 - $got; exit !(d < 1e-5 && d > -1e-5) }" || complain "$2 is $got, not $1"
}

# from_load EXPRESSION: summed over the experts, with F the share of the load.
from_load() {
    awk "{ c[NR] = \$1; total += \$1 }
         END { for (i = 1; i <= NR; i++) { F = c[i] / total; sum += $1; most = F > most ? F : most }
               print sum }" "$tmp/load"
}

run 0 qwen3_moe --json --capacity-factor 0.5 --loss l1:0.25 --loss squared --loss load_cv2 --loss entropy \
    --loss overflow --loss z:0
[ "$(grep -o '"kind"' "$tmp/out" | wc -l)" = 6 ] || complain "not six losses"
grep -q '"kind":"l1","weight":0.25,' "$tmp/out" || complain "l1 has not the weight 0.25"
counts load >"$tmp/load"
near "$(from_load '(F > 1 / NR ? F - 1 / NR : 1 / NR - F)')" l1
near "$(from_load '(F - 1 / NR) ^ 2 / 2')" squared
near "$(from_load '(F - 1 / NR) ^ 2 * NR')" load_cv2
near "$(from_load '(F > 0 ? F * log(F) : 0)')" entropy
near "$(awk "BEGIN { print $(number dropped_total) / ($(number tokens) * $(number top_k)) }")" overflow
l1=$(value l1)

# The same as text, and without their weights.
run 0 qwen3_moe --loss l1:7 --loss switch
awk -v want="$l1" '$1 == "l1" { d = $2 - want; found = d < 1e-5 && d > -1e-5 } END { exit !found }' \
    "$tmp/out" || complain "l1 is not $l1 in the text"
grep -q '^  switch  *[0-9.]*$' "$tmp/out" || complain "no switch in the text"
run 0 qwen3_moe
! grep -q '^losses' "$tmp/out" || complain "losses without --loss"

# refused PATTERN OPTION...: exit 2 with one sentence that has the pattern.
refused() {
    pattern=$1
    shift
    run 2 qwen3_moe "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $*"
}
refused "'swich'" --loss swich
refused "'switc'" --loss switc
refused "'switch:x'" --loss switch:x
refused "'switch:'" --loss switch:
refused communication --loss communication
refused "no capacity" --loss overflow
refused smooth_load --loss z --loss smooth_load
many=
for i in $(seq 1 16); do
    many="$many --loss z:$i"
done
# shellcheck disable=SC2086
refused "more than 16" $many --loss z
# shellcheck disable=SC2086
run 0 qwen3_moe $many
refused "'f8'" --dtype f8

# Storage types pass with tolerances of their own; bf16 does not with that of f32.
y=model.layers.0.mlp.y
for type in f32 f16 bf16; do
    run 0 qwen3_moe --dtype $type --expect $y
    grep -q "^engine .*, $type\$" "$tmp/out" || complain "no $type in the report"
    grep -q ': pass$' "$tmp/out" || complain "$type does not pass"
done
run 1 qwen3_moe --dtype bf16 --expect $y --tolerance 1e-5
grep -q ': FAIL$' "$tmp/out" || complain "bf16 is as exact as f32"
write_file "{$(entry two 0 384),$(entry one 384 576 '[1,48]')}" 576
# shellcheck disable=SC2086
run_exit 2 run "$DATA/qwen3_moe" --layer 0 --input "$input" --tensor two --expect one $device
grep -q "'one' has 1 tokens, but 'two' has 2" "$tmp/err" || complain "no counts of tokens in the sentence"

if [ -e /dev/full ]; then
    for options in "--json" "--stats" "--stats --json"; do
        code=0
        # shellcheck disable=SC2046,SC2086
        "$CLMOE" run $(block_args qwen3_moe model.layers.0.mlp) $options $device >/dev/full 2>"$tmp/err" || code=$?
        [ $code = 2 ] || complain "exit $code on a full disk: $options"
    done
fi
finish
