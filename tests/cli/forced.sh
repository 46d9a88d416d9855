#!/bin/sh
# Forced routing: loads that are known, distinct experts, the seed, and what does not go with it.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)
model=qwen3_moe
block=$(recorded_blocks "$model" | head -1)

# A file of many tokens for the model: x [4096,D] of zeros.
args=$(block_args "$model" "$block")
# shellcheck disable=SC2086
run_exit 0 run $args --json $device
dim=$(number dim) experts=$(number num_experts) top_k=$(number top_k)
tokens=4096
bytes=$((tokens * dim * 4))
write_file "{$(entry x 0 $bytes "[$tokens,$dim]")}" $bytes

# forced KIND [OPTION]...: $loads are the loads of the experts.
forced() {
    kind=$1
    shift
    # shellcheck disable=SC2086
    run_exit 0 run "$DATA/$model" --layer 0 --input "$input" --tensor x --force-routing "$kind" --json "$@" $device
    loads_of_report
}
loads_of_report() {
    loads=$(grep -o '"load":\[[^]]*' "$tmp/out" | sed 's/.*\[//' | tr ',' ' ')
}

# Round robin: no two loads differ by more than 1.
even() {
    echo "$loads" | awk '{ low = high = $1
        for (i = 2; i <= NF; i++) { if ($i < low) low = $i; if ($i > high) high = $i }
        exit !(NF > 1 && high - low <= 1) }' || complain "round robin, $1: loads $loads"
}
forced round-robin
even "many tokens"
grep -q '"forced_routing":"round-robin, seed 0"' "$tmp/out" || complain "the report does not name the routing"
# shellcheck disable=SC2086
run_exit 0 run $args --force-routing round-robin --seed 3 --json $device
loads_of_report
even "the recorded tokens"

# Zipf: the chance that an expert is among the K drawn, over all the ways to draw K of E.
shares() {
    awk -v E="$experts" -v K="$top_k" -v s="$1" '
        function walk(k, left, chance, e) {
            if (k == K) return
            for (e = 0; e < E; e++) if (!used[e]) {
                p[e] += chance * w[e] / left
                used[e] = 1
                walk(k + 1, left - w[e], chance * w[e] / left)
                used[e] = 0
            }
        }
        BEGIN { for (e = 0; e < E; e++) sum += w[e] = (e + 1) ^ -s
            walk(0, sum, 1)
            for (e = 0; e < E; e++) printf "%.6f ", p[e] }'
}
for exponent in 0 1.5; do
    forced zipf:$exponent --seed 7
    # Five standard deviations of a binomial load; nobody has a token twice.
    printf '%s\n%s\n' "$(shares $exponent)" "$loads" | awk -v T=$tokens '
        NR == 1 { for (i = 1; i <= NF; i++) p[i] = $i; next }
        { for (i = 1; i <= NF; i++) { off = $i - T * p[i]; if ($i > T || off * off > 25 * (T * p[i] * (1 - p[i]) + 1)) bad = 1 }
          exit bad || NF < 2 }' || complain "zipf:$exponent: loads $loads, shares $(shares $exponent)"
done
forced zipf --seed 1
one=$loads
forced zipf:1 --seed 1
[ "$one" = "$loads" ] || complain "zipf is not zipf:1, or the same seed gives other loads"
forced zipf --seed 2
[ "$one" != "$loads" ] || complain "another seed gives the same loads"
forced zipf:16 # the last experts are as good as never drawn

# The text, and a backward pass, whose router gets no gradient.
# shellcheck disable=SC2086
run_exit 0 run $args --force-routing zipf:1.5 --seed 9 $device
grep -q '^routing   forced: zipf:1.5, seed 9$' "$tmp/out" || complain "the report does not name the routing"
# shellcheck disable=SC2046,SC2086
run_exit 0 run $(backward_args "$model") --force-routing round-robin --json $device
grep -q '"backward"' "$tmp/out" || complain "no backward pass"

# What does not go with it, and what it cannot be.
refused() {
    sentence=$1
    shift
    # shellcheck disable=SC2086
    run_exit 2 run $args "$@" $device
    grep -q -F -e "$sentence" "$tmp/err" || complain "no '$sentence'"
}
refused '--force-routing does not go with --expect' --force-routing zipf --expect "$block.y"
refused '--force-routing does not go with --loss' --loss z --force-routing zipf
refused '--seed needs --force-routing' --seed 1
for bad in zipfy zipf: zipf:x zipf:-1 zipf:17 round-robin:1 random ''; do
    refused "--force-routing is '$bad'" --force-routing "$bad"
done
refused "--seed is '-1'" --force-routing zipf --seed -1
finish
