#!/bin/sh
# clmoe balance --place: the table, the plan as JSON and back again, and refused command lines.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)

# place CODE MODEL OPTION...: on the model's recorded input.
place() {
    code=$1 model=$2
    shift 2
    # shellcheck disable=SC2046,SC2086
    run_exit "$code" balance $(block_args "$model" model.layers.0.mlp) $device --place "$@"
}

# list KEY FILE: an array of numbers of a plan, a line each.
list() {
    sed "s/.*\"$1\":\[\([^]]*\)\].*/\1/" "$2" | tr , '\n'
}

# value KEY FILE: a number of a plan.
value() {
    sed "s/.*\"$1\":\([^,}]*\)[,}].*/\1/" "$2"
}

# balance_of FILE: largest / mean of its device_load; what the plan and the loads make of it.
balance_of() {
    list device_load "$1" | awk '{ s += $1; if ($1 > m) m = $1 } END { printf "%.9g\n", m * NR / s }'
}

near() {
    awk -v a="$1" -v b="$2" 'BEGIN { d = a - b; exit !(d < 1e-6 && d > -1e-6) }'
}

# Tables: a row per device, each expert there; the groups of the router on one node each.
place 0 qwen3_moe --replicas 24 --devices 8
[ "$(grep -c '^ *[0-9][0-9]* .*[0-9]' "$tmp/out")" = 8 ] || complain "not a row per device"
experts=$(sed -n 's/^ *[0-9][0-9]*  *[0-9.]*  *[0-9.]*  //p' "$tmp/out" | tr ' ' '\n' | sort -nu | wc -l)
[ "$experts" = 16 ] || complain "$experts experts in the table"
grep -q '^devices .* load [0-9.]* before, [0-9.]* after$' "$tmp/out" || complain "no summary"
grep -q MaxVio "$tmp/out" && complain "a chart of one step"
place 0 deepseek_v3 --replicas 24 --devices 8 --nodes 2 --steps 3 --plan "$tmp/groups"
grep -q '2 nodes, 4 groups packed onto them' "$tmp/out" || complain "not the groups of the router"
grep -q '^MaxVio' "$tmp/out" || complain "no report of three steps"
crossing=$(list physical_to_logical "$tmp/groups" |
    awk '{ print int($1 / 4), int((NR - 1) / 12) }' | sort -u | wc -l)
[ "$crossing" = 4 ] || complain "a group is on two nodes"

# The plan: its numbers agree.
place 0 qwen3_moe --replicas 24 --devices 8 --plan "$tmp/plan"
[ "$(list physical_to_logical "$tmp/plan" | wc -l)" = 24 ] || complain "not 24 slots"
list physical_to_logical "$tmp/plan" | sort -n | uniq -c | awk '{ print $1 }' >"$tmp/counted"
list copies "$tmp/plan" | cmp -s - "$tmp/counted" || complain "other copies than slots"
near "$(balance_of "$tmp/plan")" "$(value balance_after "$tmp/plan")" || complain "another balance"
[ "$(list load "$tmp/plan" | awk '{ s += $1 } END { print s }')" = 48 ] || complain "not 12 x 4 pairs"
place 0 qwen3_moe --replicas 24 --devices 8 --plan -
cmp -s "$tmp/out" "$tmp/plan" || complain "standard output has another plan"
place 0 qwen3_moe --replicas 24 --devices 8 --json
grep -o '"placement":{.*}}$' "$tmp/out" | sed 's/"placement"://; s/}$//' | cmp -s - "$tmp/plan" ||
    complain "the report has another plan"

# A plan of before: it stays for the same load, and few slots change for another.
place 0 qwen3_moe --replicas 24 --devices 8 --previous "$tmp/plan"
grep -q '; 0 of 24 slots change' "$tmp/out" || complain "the same load moves slots"
seq 0 23 | awk '{ print $1 % 16 }' | paste -sd, - | sed 's/.*/{"physical_to_logical":[&]}/' >"$tmp/row"
for most in 1 3; do
    place 0 qwen3_moe --replicas 24 --devices 8 --previous "$tmp/row" --max-moves $most \
        --plan "$tmp/moved$most"
    moves=$(value moves "$tmp/moved$most")
    [ "$moves" -ge 1 ] && [ "$moves" -le $most ] || complain "$moves of $most moves"
    awk "BEGIN { exit !($(value balance_after "$tmp/moved$most") < $(value balance_before "$tmp/moved$most")) }" ||
        complain "$most moves lower nothing"
done
place 0 qwen3_moe --replicas 24 --devices 8 --previous "$tmp/row" --tolerance 0.1 --plan "$tmp/near"
awk "BEGIN { exit !($(value balance_after "$tmp/near") <= 1.1 * $(value balance_after "$tmp/plan")) }" ||
    complain "not within the tolerance"
near_moves=$(value moves "$tmp/near")
place 0 qwen3_moe --replicas 24 --devices 8 --previous "$tmp/row" --plan "$tmp/row" --force
[ "$near_moves" -lt "$(value moves "$tmp/row")" ] || complain "the tolerance saves no move"
near "$(value balance_after "$tmp/row")" "$(value balance_after "$tmp/plan")" ||
    complain "the moved plan is worse than a new one"

# refused PATTERN OPTION...: exit 2 with one sentence that has the pattern.
refused() {
    pattern=$1
    shift
    place 2 qwen3_moe "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout: $*"
}
refused "replicas is missing" --devices 8
refused "devices is missing" --replicas 8
refused "replicas is 8, .* 16" --replicas 8 --devices 4
refused "replicas is 20, .* 8" --replicas 20 --devices 8
refused "devices is 8, .* 3" --replicas 24 --devices 8 --nodes 3
refused "groups, 5" --replicas 24 --devices 8 --groups 5
refused "'0'" --replicas 0 --devices 8
refused "tolerance needs --previous" --replicas 24 --devices 8 --tolerance 0.1
refused "max-moves needs --previous" --replicas 24 --devices 8 --max-moves 2
refused "exists already" --replicas 24 --devices 8 --plan "$tmp/plan"
refused "both write" --replicas 24 --devices 8 --plan - --json
refused "both write" --replicas 24 --devices 8 --plan - --csv -
refused "same file as --csv" --replicas 24 --devices 8 --plan "$tmp/new" --csv "$tmp/new"
refused "same file as --previous" --replicas 24 --devices 8 --previous "$tmp/plan" --force --csv "$tmp/plan"
refused "file of the model" --replicas 24 --devices 8 --force --plan "$DATA/qwen3_moe/config.json"

# broken PATTERN TEXT: a plan of before that is none.
broken() {
    printf '%s' "$2" >"$tmp/broken"
    refused "$1" --replicas 24 --devices 8 --previous "$tmp/broken"
}
refused "$tmp/none" --replicas 24 --devices 8 --previous "$tmp/none"
refused "24 slots .* 16" --replicas 16 --devices 8 --previous "$tmp/plan"
broken "$tmp/broken" '{'
broken "no array" '[1, 2]'
broken "no array" '{"physical_to_logical": 3}'
slots() {
    seq 0 23 | awk -v last="$1" '{ print $1 == 23 ? last : $1 % 16 }' | paste -sd, -
}
broken 'physical_to_logical\[23\]' "{\"physical_to_logical\": [$(slots 1.5)]}"
broken 'physical_to_logical\[23\]' "{\"physical_to_logical\": [$(slots 4294967296)]}"
broken "is 16, " "{\"physical_to_logical\": [$(slots 16)]}"
broken "0 copies of expert 15" "{\"physical_to_logical\": [$(slots 1 | sed 's/,15,/,1,/')]}"
finish
