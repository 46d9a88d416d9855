#!/bin/sh
# What run and balance write and read: to each kind of file, what is refused before any work, and signals.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)
recorded=$DATA/qwen3_moe/activations.safetensors
block="$DATA/qwen3_moe --layer 0 --tensor model.layers.0.mlp.x"
work=$tmp/work
mkdir "$work"

# tool CODE OPTION...: `$command` on $input.
tool() {
    want=$1
    shift
    # shellcheck disable=SC2086
    run_exit "$want" $command $block --input "$input" $device "$@"
}

# refused PATTERN OPTION...: exit 2 with one sentence that has the pattern, and nothing on stdout.
refused() {
    pattern=$1
    shift
    tool 2 "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $command $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $command $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout: $command $*"
}

# same FILE WHAT: FILE has what the plain file has.
same() {
    cmp -s "$1" "$work/plain" || complain "$command: $2 is not as a plain file"
}

for command in run "balance --steps 3"; do
    rm -rf "$work"
    mkdir "$work"
    input=$recorded to=--output
    [ "$command" = run ] || to=--csv
    tool 0 $to "$work/plain"
    grep -q "MaxVio" "$tmp/out" || complain "$command: no report"
    tool 0 $to -
    same "$tmp/out" "-"
    ln -s target "$work/link"
    tool 0 $to "$work/link"
    same "$work/target" "what a link names"
    [ -h "$work/link" ] || complain "$command: the link is gone"
    echo old >"$work/target"
    refused "exists already" $to "$work/link"
    [ "$(cat "$work/target")" = old ] || complain "$command: a refused file changed"
    input=$work/none
    tool 2 $to "$work/link" --force
    input=$recorded
    [ "$(cat "$work/target")" = old ] || complain "$command: a file changed without a result"
    tool 0 $to "$work/link" --force
    same "$work/target" "a file that is overwritten"
    mkfifo "$work/fifo"
    cat "$work/fifo" >"$work/read" &
    tool 0 $to "$work/fifo"
    wait $!
    same "$work/read" "what comes through a FIFO"
    [ -p "$work/fifo" ] || complain "$command: the FIFO is gone"
    # The error comes before any tensor is read.
    input=$work/none
    for place in "$work" "$work/none/y" "$work/plain/y" "" "$work/plain"; do
        refused "$to" $to "$place"
    done
    chmod 444 "$work/plain"
    refused "read-only" $to "$work/plain" --force
    chmod 644 "$work/plain"
    refused "both write to standard output" $to - --json
    refused "needs $to" --force
    cp "$recorded" "$work/input"
    input=$work/input
    refused "same file as --input" --force $to "$work/input"
    [ -z "$(find "$work" -name '.clmoe-*')" ] || complain "$command: a temporary file is left"
done

# No output is a file of the model, by any name, nor would become one.
model=$work/model
cp -r "$DATA/qwen3_moe" "$model"
chmod -R u+w "$model"
mkdir "$model/parts"
mv "$model/model.safetensors" "$model/parts/one"
grep -ao '"model\.[a-z0-9_.]*"' "$model/parts/one" | sort -u | sed 's/$/: "parts\/one"/' | paste -sd, |
    sed 's/^/{"weight_map": {/; s/$/}}/' >"$model/model.safetensors.index.json"
ln -s model/config.json "$work/symbolic"
ln "$model/parts/one" "$work/hard"
ln -s model "$work/folder"
input=$recorded
for command in run "balance --steps 3"; do
    to=--output block="$model --layer 0 --tensor model.layers.0.mlp.x"
    [ "$command" = run ] || to=--csv
    sum=$(cd "$model" && find . -type f | sort | xargs cksum)
    for place in model/config.json model/parts/one model/model.safetensors.index.json symbolic hard folder/parts/one; do
        refused "$to $work/$place is a file of the model" --force $to "$work/$place"
    done
    refused "is a file of the model" $to "$work/folder/model.safetensors"
    tool 0 $to "$model/other"
    tool 0 --force $to "$model/other"
    rm "$model/other"
    [ "$sum" = "$(cd "$model" && find . -type f | sort | xargs cksum)" ] || complain "$command: the model changed"
    # What is appended to the model by the shell would end it, too.
    cp "$model/config.json" "$work/kept"
    code=0
    # shellcheck disable=SC2086
    "$CLMOE" $command $block --input "$input" $device $to - >>"$model/config.json" 2>"$tmp/err" || code=$?
    [ $code = 2 ] || complain "exit $code: appended to the model"
    cmp -s "$model/config.json" "$work/kept" || complain "$command: appended to the model"
    cp "$input" "$work/input"
    code=0
    # shellcheck disable=SC2086,SC2094 # that is the mistake
    "$CLMOE" $command $block --input - $device $to "$work/input" --force <"$work/input" 2>"$tmp/err" || code=$?
    [ $code = 2 ] || complain "exit $code: standard input is the output"
    cmp -s "$input" "$work/input" || complain "$command: standard input is overwritten"
done
block="$DATA/qwen3_moe --layer 0 --tensor model.layers.0.mlp.x"
command=run input=$recorded
refused "both write to standard output" --output - --stats

# Standard input and a FIFO are read as the file is.
for input in - "$work/fifo"; do
    cat "$recorded" >"$work/fifo" &
    # shellcheck disable=SC2086
    "$CLMOE" run $block --input "$input" --json $device \
        <"$([ "$input" = - ] && echo "$work/fifo" || echo /dev/null)" >"$tmp/out" 2>"$tmp/err" ||
        complain "--input $input"
    wait $!
    grep -q '"tokens":12' "$tmp/out" || complain "--input $input: other tokens"
done
# shellcheck disable=SC2086
run_exit 2 run $block --input - </dev/null
grep -q "standard input" "$tmp/err" || complain "no standard input in the sentence"

# A signal: what there is by then is written, also if it comes twice at once, as from timeout.
# shellcheck disable=SC2086
"$CLMOE" run $block --input "$recorded" $device --repeat 1000000 --json --output "$work/stopped" \
    >"$tmp/out" 2>"$tmp/err" &
code=0 tool=$!
sleep 8
kill -TERM $tool
kill -TERM $tool
wait $tool || code=$?
[ $code = 143 ] || complain "exit $code after SIGTERM"
grep -q '^{.*"runs":[0-9]*,.*}$' "$tmp/out" || complain "no report after a signal"
grep -q "interrupted by SIGTERM" "$tmp/err" || complain "no signal in the sentence"
[ -s "$work/stopped" ] || complain "no result after a signal"
if command -v timeout >/dev/null; then
    code=0
    # shellcheck disable=SC2086
    timeout --preserve-status -s INT 8 "$CLMOE" balance $block --input "$recorded" $device --steps 1000000 --csv "$work/csv" --json \
        >"$tmp/out" 2>"$tmp/err" || code=$?
    [ $code = 130 ] || complain "exit $code after SIGINT"
    steps=$(($(wc -l <"$work/csv") - 1))
    [ $steps -gt 0 ] || complain "no steps after a signal"
    [ "$(tail -1 "$work/csv" | cut -d, -f1)" = $((steps - 1)) ] || complain "the last line is not whole"
    [ "$(grep -o '"step":' "$tmp/out" | wc -l)" = $steps ] || complain "other steps in the JSON"
fi
# A reader that has gone is an error with a sentence.
# shellcheck disable=SC2086
{ code=0; "$CLMOE" devices 2>"$tmp/err" || code=$?; echo $code >"$tmp/code"; } | :
case "$(cat "$tmp/code")" in 0) ;; 2) grep -q 'standard output' "$tmp/err" || complain "no sentence" ;; *) complain "exit $(cat "$tmp/code") of a closed pipe" ;; esac
# A closed standard output is one, too.
code=0
"$CLMOE" devices >&- 2>"$tmp/err" || code=$?
[ $code = 2 ] || complain "exit $code with a closed standard output"
finish
