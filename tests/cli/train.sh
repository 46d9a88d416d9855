#!/bin/sh
# clmoe train: what a run leaves, that it goes on bit for bit after any end, and what it refuses.
# The argument is the layer of tests/fault whose compiler gets a signal, if there is one.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)
text=$tmp/text
# A text of words that a model can learn, of which no two parts are equal.
awk 'BEGIN { srand(3); split("the of and to in that he shall unto for i his a lord they", w, " ")
    for (i = 0; i < 4000; i++) printf "%s%s", w[1 + int(rand() * 15)], rand() < 0.1 ? ".\n" : " " }' >"$text"
sizes="--dim 16 --hidden 16 --context 4 --batch 128 --sequence 32 --steps 60 --warmup 5 --log-every 5 --validate-every 20 --save-every 7"

# train_exit CODE DIR [OPTION]...
train_exit() {
    code=$1 folder=$tmp/$2
    shift 2
    # shellcheck disable=SC2086
    run_exit "$code" train --text "$text" --out "$folder" $sizes "$@" $device
}

# column NAME FILE: its values.
column() {
    awk -F, -v name="$1" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) at = i; next } { print $at }' "$2"
}

# same A B: the same state, and the same metrics but for times.
same() {
    cmp -s "$tmp/$1/state.safetensors" "$tmp/$2/state.safetensors" || complain "$1 and $2 have other states"
    for run in "$1" "$2"; do
        awk -F, -v OFS=, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "tokens_per_s" || $i == "moe_share") out[i] }
            { for (i in out) $i = ""; print }' "$tmp/$run/metrics.csv" >"$tmp/metrics.$run"
    done
    cmp -s "$tmp/metrics.$1" "$tmp/metrics.$2" || complain "$1 and $2 have other metrics"
}

# --- A run ----------------------------------------------------------------------------------------
train_exit 0 whole --balance quantile,switch --noise gaussian:0.1 --hidden-dropout 0.1
csv=$tmp/whole/metrics.csv
[ "$(column step "$csv" | tr '\n' ' ')" = "1 5 10 15 20 25 30 35 40 45 50 55 60 " ] || complain "steps: $(column step "$csv" | tr '\n' ' ')"
awk -F, 'NR == 1 { n = NF } NF != n { exit 1 }' "$csv" || complain "lines of another length than the head"
first=$(column loss "$csv" | head -1) last=$(column validation_loss "$csv" | tail -1)
awk "BEGIN { exit !($last < $first - 1) }" || complain "nothing was learned: $first, then $last"
column loss_switch "$csv" | awk '$1 < 0.9 || $1 > 4 { exit 1 }' || complain "loss_switch is none"
for l in 0 1; do
    sum=0
    for e in 0 1 2 3 4 5 6 7; do sum=$(awk "BEGIN { print $sum + $(column share_${l}_$e "$csv" | tail -1) }"); done
    awk "BEGIN { exit !($sum > 0.999 && $sum < 1.001) }" || complain "the shares of layer $l are $sum"
done
grep -q 'validation loss [0-9.]* nats per byte after 60 steps, MaxVio' "$tmp/out" || complain "no summary"
grep -q 'step 60/60' "$tmp/err" || complain "no progress"

# The speed is that of steps: those with a validation before them, or a saved state, are no slower.
sizes_of_all=$sizes sizes=$(echo "$sizes" | sed 's/--log-every 5 --validate-every 20 --save-every 7/--log-every 1 --validate-every 2 --save-every 2/')
train_exit 0 timed --balance quantile,switch --noise gaussian:0.1 --hidden-dropout 0.1
sizes=$sizes_of_all
# speed FIRST: the median of every second step from FIRST on.
speed() { column tokens_per_s "$tmp/timed/metrics.csv" | awk -v first="$1" 'NR >= first && NR % 2 == first % 2' | sort -g | sed -n 15p; }
awk "BEGIN { exit !($(speed 3) > 0.5 * $(speed 4)) }" || complain "$(speed 3) tokens/s after a validation, else $(speed 4)"

# --- Ends -----------------------------------------------------------------------------------------
# One run that is ended three times: what one end did wrong, the steps after it would carry to the last.
# ended SIGNAL STEP ARGUMENT...: begins it or goes on, and ends it after that step.
ended() {
    signal=$1 step=$2
    shift 2
    (cd "$tmp" && exec "$CLMOE" train "$@" >"$tmp/out" 2>"$tmp/err") &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
        [ ! -s "$csv" ] || [ "$(tail -1 "$csv" | cut -d, -f1 | tr -dc 0-9)0" -lt "${step}0" ] || break
        sleep 0.01
    done
    kill -"$signal" $pid 2>/dev/null || echo "the run ended before signal $signal" >&2
    code=0
    wait $pid || code=$?
}
csv=$tmp/ended/metrics.csv
mkdir "$tmp/ended" # killed before it had a run.json, it begins anew
echo '{' >"$tmp/ended/run.json.tmp"
# A relative path of the text: it goes on from elsewhere.
# shellcheck disable=SC2086 # options are words
ended KILL 1 --text text --out "$tmp/ended" $sizes --balance quantile,switch --noise gaussian:0.1 --hidden-dropout 0.1 $device
# A signal while the programs are made: here whichever of them is, below one whose compiler has a handler
# for it, as PoCL's does, which ends the process.
# early SENTENCE COMMAND...: what clmoe train, after the command, says; what has learned nothing is not kept.
early() {
    sentence=$1 code=0
    shift
    POCL_CACHE_DIR=$tmp/no-programs "$@" --no-cache $device >"$tmp/out" 2>"$tmp/err" || code=$?
    [ "$code" = 143 ] || complain "exit $code after SIGTERM at the start: $*"
    grep -q "interrupted by SIGTERM; $sentence" "$tmp/err" || complain "no word of SIGTERM at the start: $*"
    for left in model.safetensors config.json report.html; do
        [ ! -e "$tmp/early/$left" ] || grep -q 'after step [1-9]' "$tmp/err" || complain "$left is left, of no step: $*"
    done
}
# shellcheck disable=SC2046,SC2086
early '\(no step was done\|.* after step [1-9]\)' timeout --preserve-status -s TERM 1 "$CLMOE" train --text "$text" --out "$tmp/early" \
    $(echo "$sizes" | sed 's/--steps 60/--steps 9999999/')
if [ -n "${1-}" ] && OPENCL_LAYERS=$1 CLMOE_BREAK_LOG=$tmp/loaded "$CLMOE" devices >/dev/null &&
    [ -e "$tmp/loaded" ]; then
    rm -rf "$tmp/early"
    # shellcheck disable=SC2086
    early 'no step was done' env OPENCL_LAYERS="$1" CLMOE_BREAK_SIGNAL=15 "$CLMOE" train --text "$text" --out "$tmp/early" $sizes
    [ ! -e "$tmp/early" ] || complain "a folder of a run that was not begun"
    mkdir "$tmp/early"
    cp "$tmp/whole/run.json" "$tmp/early"
    early "clmoe train --resume $tmp/early goes on" env OPENCL_LAYERS="$1" CLMOE_BREAK_SIGNAL=15 "$CLMOE" train --resume "$tmp/early"
fi
ended KILL 10 --resume "$tmp/ended"
ended INT 25 --resume "$tmp/ended"
if [ "$code" != 0 ]; then
    [ "$code" = 130 ] || complain "exit $code after SIGINT"
    grep -q -- "--resume $tmp/ended goes on after step [0-9]" "$tmp/err" || complain "no word of how to go on"
fi
if command -v flock >/dev/null; then # as another trainer holds it
    code=0
    flock "$tmp/ended" "$CLMOE" train --resume "$tmp/ended" >"$tmp/out" 2>"$tmp/err" || code=$?
    { [ "$code" = 2 ] && grep -q "another clmoe train is at work in '$tmp/ended'" "$tmp/err"; } || complain "two at once: $code"
fi
# A line that was half written, and another one of steps that are not in the state.
printf '9999,1,2\n58,0.' >>"$csv"
run_exit 0 train --resume "$tmp/ended"
same whole ended
run_exit 0 train --resume "$tmp/ended" # at its end already
same whole ended

sizes_of_all=$sizes sizes=$(echo "$sizes" | sed 's/--save-every 7/--save-every 1/')
train_exit 2 away --balance quantile,switch --noise gaussian:0.1 --hidden-dropout 0.1 --lr 10 --weight-decay 10 --clip 0
sizes=$sizes_of_all
grep -q 'finite number any more; a smaller --lr' "$tmp/err" || complain "no word of numbers that are none"
run_exit 2 train --resume "$tmp/away" # from the last state of numbers
grep -q 'finite number any more' "$tmp/err" || complain "the state that was left is not one of numbers"

# --- What is refused ------------------------------------------------------------------------------
# refused SENTENCE ARGUMENT...: nothing is written.
refused() {
    sentence=$1
    shift
    # shellcheck disable=SC2086
    run_exit 2 train "$@" $device
    grep -q -F -e "$sentence" "$tmp/err" || complain "no '$sentence'"
    [ ! -e "$tmp/new" ] || complain "a folder was made: $*"
}
refused '--text is needed' --out "$tmp/new"
refused '--out is needed' --text "$text"
refused 'is not empty; --resume' --text "$text" --out "$tmp/whole"
refused 'exists and is no folder' --text "$text" --out "$text"
refused "--out '$tmp/none/new' cannot be made" --text "$text" --out "$tmp/none/new"
refused "--text '$tmp/none' cannot be read" --text "$tmp/none" --out "$tmp/new"
refused "has 3 bytes" --text "$(printf abc >"$tmp/short"; echo "$tmp/short")" --out "$tmp/new"
refused '--dim is 24, which is no multiple of 16' --text "$text" --out "$tmp/new" --dim 24
refused '--batch is 100, which is no multiple of --sequence' --text "$text" --out "$tmp/new" --batch 100
refused '--top-k is 9, but --experts is 8' --text "$text" --out "$tmp/new" --top-k 9
refused "--balance has 'bias' and 'quantile'" --text "$text" --out "$tmp/new" --balance bias,quantile
refused "--balance has 'bogus', which is none of none, switch" --text "$text" --out "$tmp/new" --balance bogus
refused '--balance soft-moe does not go with --z-loss' --text "$text" --out "$tmp/new" --balance soft-moe --z-loss 1
refused "--keep is 'all', which is none of position" --text "$text" --out "$tmp/new" --keep all
refused '--lr is 11, which is more than 10' --text "$text" --out "$tmp/new" --lr 11
for schedule in 1:5 1:5, 1:5,1:5,2 x 1:5,,2 9; do
    refused '--top-k' --text "$text" --out "$tmp/new" --top-k-schedule $schedule
done
refused '--balance quantile needs more --experts' --text "$text" --out "$tmp/new" --experts 2 --balance quantile
refused 'more than 2^32 - 1' --text "$text" --out "$tmp/new" --dim 2048 --hidden 65536 --experts 16
[ -n "$device" ] || refused 'the run needs a buffer of' --text "$text" --out "$tmp/new" --dim 1024 --hidden 8192 --experts 64
mkfifo "$tmp/pipe"
refused "pipe' is not a regular file" --text "$tmp/pipe" --out "$tmp/new"
cp "$text" "$tmp/$(printf 'caf\351')"
refused 'is not UTF-8' --text "$tmp/$(printf 'caf\351')" --out "$tmp/new"
# clash OPTION...: the first two do not go together.
clash() {
    refused "$1 does not go with $2" --text "$text" --out "$tmp/new" $1 ${3-} $2 ${4-}
}
clash '--keep round' --capacity-factor '' 1
clash '--keep round' '--balance sinkhorn'
clash '--keep round' '--balance rebalance'
clash '--keep round' --per-sequence '--balance switch'
clash '--overflow reroute' --per-sequence '--balance switch --capacity-factor 1'
clash '--overflow reroute' '--balance expert-choice' '--capacity-factor 1'
clash --anneal '--noise none' 5
clash '--balance soft-moe' --noise '' gumbel
clash '--balance soft-moe' --expert-dropout '' 0.1
clash '--balance smooth-load' '--noise gumbel'
clash '--balance smooth-load' '--noise none'
clash '--keep weight' '--balance expert-choice'
clash --per-sequence '--balance expert-choice'
clash '--balance expert-choice:2' '--capacity-factor 1'
# unheard OPTION WITHOUT...: it would have no effect.
unheard() {
    option=$1 without=$2
    shift 2
    # shellcheck disable=SC2086
    refused "$option has no effect $without" --text "$text" --out "$tmp/new" $option "$@"
}
for keep in position choice-major priority weight random; do
    unheard "--keep $keep" 'without a --capacity-factor above 0'
done
unheard '--keep weight' 'without a --capacity-factor' --capacity-factor 0
unheard '--overflow reroute' 'without a --capacity-factor' --capacity-factor 0
unheard --per-sequence 'without a loss in --balance' --balance bias
unheard '--balance-from 5' 'with --balance none' --balance none
unheard '--balance-from 60' 'with --steps 60' --balance switch --steps 60
unheard '--anneal 5' 'with a --noise of 0' --noise gaussian:0
refused "--noise has a number for 'none'" --text "$text" --out "$tmp/new" --noise none:1
refused "--per-sequence needs --balance or --capacity-factor" --text "$text" --out "$tmp/new" --per-sequence
refused 'but all experts are chosen until --soft-steps 5' --text "$text" --out "$tmp/new" --balance smooth-load --soft-steps 5
refused 'needs 257 slots or more' --text "$text" --out "$tmp/new" --balance soft-moe:4096 --batch 1048576
refused 'was begun, without --lr' --resume "$tmp/whole" --lr 1
refused 'is no folder of a run' --resume "$tmp"
cp "$tmp/whole/run.json" "$tmp/run.json.right"
for bad in '{}' '{"command":["train","--resume","x"]}' '{"command":["train"]}' '{"command":["train","--help"]}' '{"command":[1]}' '['; do
    echo "$bad" >"$tmp/whole/run.json"
    refused 'run.json' --resume "$tmp/whole"
done
cp "$tmp/run.json.right" "$tmp/whole/run.json"
head -c 5000 "$tmp/whole/state.safetensors" >"$tmp/torn"
cp "$tmp/torn" "$tmp/ended/state.safetensors"
refused 'state.safetensors' --resume "$tmp/ended"
cp "$text" "$tmp/text.right"
tr 'a' 'b' <"$tmp/text.right" >"$text"
refused 'is not what the run of' --resume "$tmp/whole"
cp "$tmp/text.right" "$text"
finish
