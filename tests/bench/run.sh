#!/bin/sh
# clmoe-bench on tiny cases: its rows, its options, its exit codes. Usage: run.sh CLMOE-BENCH ROWS
set -eu
bench=$1 rows=$2
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
device=${CLMOE_TEST_DEVICE:+--device $CLMOE_TEST_DEVICE} # which has no spaces here

fail() {
    echo "$*" >&2
    exit 1
}

# run CODE ARGUMENT...: the exit code must be CODE.
run() {
    want=$1 code=0
    shift
    # shellcheck disable=SC2086 # two words
    "$bench" $device "$@" >"$tmp/out" 2>"$tmp/err" || code=$?
    [ "$code" = "$want" ] || {
        cat "$tmp/out" "$tmp/err" >&2
        fail "clmoe-bench $*: exit code $code, not $want"
    }
}

# expect FILE LINE: FILE has the line.
expect() {
    grep -qxF -e "$2" "$1" || {
        cat "$1" >&2
        fail "missing: $2"
    }
}

# says TEXT: standard error has the text.
says() {
    grep -qF -e "$1" "$tmp/err" || {
        cat "$tmp/err" >&2
        fail "does not say: $1"
    }
}

# quiet: standard error has no words but of nv_mma and nv_wgmma, which have no f32, and PoCL's compiler.
quiet() {
    ! grep -v -e "skipped .*, nv_.*mma[a-z-]*: " -e '^[0-9]* warnings* generated\.$' "$tmp/err" >&2 ||
        fail "unexpected words on standard error"
}

# PoCL takes longest for engine tiled; how fast that is does not matter here.
without_optimization() { export POCL_EXTRA_BUILD_FLAGS=-cl-opt-disable; }
as_usual() { unset POCL_EXTRA_BUILD_FLAGS; }

echo "== every engine and step"
without_optimization
run 0 --case tiny,tiny-router --engine all,ref --repeat 3 --force --json "$tmp/rows.json"
as_usual
[ ! -s "$tmp/out" ] || fail "--json prints a table too"
quiet
"$rows" "$tmp/rows.json" >"$tmp/lines"
for step in layer score topk plan routing topk_to_plan experts combine stats; do
    expect "$tmp/lines" "tiny 37 ref $step"
    expect "$tmp/lines" "tiny 1 ref $step"
done
for step in read copy fma; do expect "$tmp/lines" "roofline 0 roofline $step"; done
grep -q "tiny-router 70 .* topk_to_plan" "$tmp/lines" || fail "tiny-router was not run"
! grep -q "tiny-router 70 .* experts" "$tmp/lines" || fail "a routing-only case has experts"
for policy in expert-choice sinkhorn reroute; do
    grep -q "tiny-router 70 .* routing:$policy\$" "$tmp/lines" || fail "no routing:$policy"
done
! grep -q "balance\|train\|backward" "$tmp/lines" || fail "a step that was not named was timed"
[ "$(sort "$tmp/lines" | uniq -d)" = "" ] || fail "rows appear twice"

echo "== patterns and choices, written to each kind of file"
mkfifo "$tmp/fifo"
ln -s target "$tmp/link"
pattern() { # PATTERN FILE
    run 0 --case tiny --tokens 37 --engine ref --step layer,plan --pattern "$1" --repeat 1 --json "$2"
}
has_pattern() { # PATTERN ROWS
    "$rows" "$2" | grep -v roofline >"$tmp/lines"
    printf 'tiny 37 ref layer\ntiny 37 ref plan\n' | cmp -s - "$tmp/lines" || fail "other rows than asked"
    grep -q "\"pattern\": \"$1\"" "$2" || fail "the pattern is not in the rows"
}
pattern zipf -
has_pattern zipf "$tmp/out"
cat "$tmp/fifo" >"$tmp/rows.json" &
pattern one-expert "$tmp/fifo"
wait $!
has_pattern one-expert "$tmp/rows.json"
pattern round-robin "$tmp/link"
[ -h "$tmp/link" ] || fail "the link was replaced"
has_pattern round-robin "$tmp/target"
run 0 --case tiny --engine ref --step dispatch --tokens 1 --repeat 1
grep -q 'tiny .* dispatch .* ref' "$tmp/out" || fail "no table"

run 0 --case tiny --engine ref --step experts --tokens 37 --repeat 1 --markdown
expect "$tmp/out" "    clmoe-bench${device:+ $device} --case tiny --engine ref --step experts --tokens 37 --repeat 1 --markdown"
grep -q '^| tiny | 37 | 6 | experts | ref | [0-9]' "$tmp/out" || fail "no row in markdown"
grep -q '^clmoe [0-9.]*, commit [^ ]*; measured read' "$tmp/out" || fail "no commit in markdown"

echo "== balance"
run 0 --case tiny --tokens 37 --engine ref --step layer:train,layer:train+balance,balance,bias_counts \
    --repeat 1 --force --json "$tmp/rows.json"
"$rows" "$tmp/rows.json" >"$tmp/lines"
for step in layer:train layer:train+balance balance bias_counts; do expect "$tmp/lines" "tiny 37 ref $step"; done

echo "== backward"
without_optimization
run 0 --case tiny --tokens 37 --engine all,ref \
    --step backward,backward:data,backward:weights,train --repeat 1 --force --json "$tmp/rows.json"
as_usual
quiet
"$rows" "$tmp/rows.json" >"$tmp/lines"
for step in backward backward:data backward:weights train; do
    expect "$tmp/lines" "tiny 37 ref $step"
done
! grep -q "packed\|peer:clblast" "$tmp/lines" || fail "packed weights have gradients"

echo "== storage types"
for type in f16 bf16; do
    run 0 --case tiny --tokens 37 --engine ref --step layer,experts,train --dtype $type --repeat 1 \
        --gradient-type weights --force --json "$tmp/rows.json"
    [ "$(grep -c '"gradient_type": "weights"' "$tmp/rows.json")" = 1 ] || fail "not one row of gradients"
    "$rows" "$tmp/rows.json" >/dev/null
done

echo "== start times"
run 0 --cold --case tiny --engine ref --repeat 1 --force --json "$tmp/rows.json"
"$rows" "$tmp/rows.json" >"$tmp/lines"
for start in cold warm cached; do expect "$tmp/lines" "tiny 37 ref create_$start"; done

echo "== memory"
run 0 --memory --case tiny --tokens 37 --engine ref
grep -q '^| tiny | 37 | ref | f32 | 0\.[0-9] | 0\.[0-9] | [0-9.]* | [0-9.]* + [0-9.]* | [0-9.]* + [0-9.]* |$' "$tmp/out" || fail "no memory"

echo "== tile sizes"
without_optimization
run 0 --tune "$tmp/tuned.json" --case tiny --tokens 37 --engine tiled --repeat 1
run 2 --tune "$tmp/tuned.json" --case tiny --tokens 37 --engine tiled --repeat 1 && says "--force"
run 0 --tune "$tmp/tuned.json" --force --case tiny --tokens 37 --engine tiled --repeat 1
as_usual
[ "$(grep -c '"columns"' "$tmp/tuned.json")" = 1 ] || fail "not one entry of the engine"
run 2 --tune "$tmp/rows.json" --force --case tiny --engine tiled --repeat 1 && says "not a tuning file"
run 2 --tune "$tmp/x.json" --case tiny-router && says "needs a case with experts"
run 2 --tune "$tmp/x.json" --case tiny --engine ref && says "nothing to tune"

echo "== bad input"
run 2 --case huge && says "--case 'huge' is unknown"
run 2 --case tiny,, && says "--case '' is unknown"
run 2 --step gemm && says "--step 'gemm' is unknown"
run 2 --dtype f64 && says "--dtype 'f64' is unknown"
run 2 --gradient-type f16 && says "--gradient-type 'f16' is unknown"
run 2 --pattern round-robin --step plan,topk && says "--step topk does not go with --pattern round-robin"
run 2 --pattern random && says "--pattern 'random' is unknown"
run 2 --peer mkl && says "--peer 'mkl' is unknown"
run 2 --engine turbo --case tiny && says "engine 'turbo' is unknown"
run 2 --engine "" --case tiny && says "engine '' is unknown"
run 2 --engine ref, --case tiny && says "engine '' is unknown"
run 2 --repeat 0 && says "--repeat is '0'"
run 2 --repeat 3x && says "--repeat is '3x'"
for mode in "" "--memory" "--cold --repeat 1" "--tune -"; do
    # shellcheck disable=SC2086
    run 2 --tokens 2 --case tiny --engine ref $mode && says "--tokens is 2, but the chosen cases have 37, 1"
done
run 2 --step routing:sinkhorn --case tiny --engine ref && says "--step routing:sinkhorn is in none of the cases tiny"
# In the place of the device under test.
under_test=$device device=
run 2 --device 999 && says "--device is 999"
run 2 --device "nosuchdevice" && says "--device is 'nosuchdevice'"
device=$under_test
run 2 --case && says "needs a value"
run 2 --turbo && says "unknown option '--turbo'"
run 2 --tokns 1 && says "unknown option '--tokns'; did you mean --tokens?"
run 2 surplus && says "unexpected argument 'surplus'"
run 2 --json "" && says "names no file"

echo "== outputs"
# Refused before anything is measured, and what is there stays.
echo old >"$tmp/file"
for option in --json --tune; do
    for place in "$tmp" "$tmp/none/x" "$tmp/file/x" "$tmp/file"; do
        run 2 $option "$place" && says "$option '$place'"
    done
done
[ "$(cat "$tmp/file")" = old ] || fail "a refused file changed"
quick="--case tiny --tokens 37 --engine ref --step plan --repeat 1"
if [ -e /dev/full ]; then
    for options in --help ""; do
        code=0
        # shellcheck disable=SC2086
        "$bench" $quick $options >/dev/full 2>"$tmp/err" || code=$?
        [ $code = 2 ] || fail "exit $code on a full disk: $options"
        says "standard output"
    done
fi
# A signal leaves the rows until then.
if command -v timeout >/dev/null; then
    code=0
    # shellcheck disable=SC2086
    timeout --preserve-status -s INT 6 "$bench" $device --case tiny --tokens 37 --engine ref --step plan,topk,layer --repeat 3000 \
        --json "$tmp/stopped.json" >"$tmp/out" 2>"$tmp/err" || code=$?
    [ $code = 130 ] || fail "exit $code after SIGINT"
    says "interrupted by SIGINT"
    "$rows" "$tmp/stopped.json" >/dev/null
fi

echo "== help and version"
run 0 --help
grep -q -- --json "$tmp/out" && grep -q deepseek-v3 "$tmp/out" || fail "--help is not complete"
run 0 --version
grep -q '^clmoe-bench [0-9]' "$tmp/out" || fail "--version is '$(cat "$tmp/out")'"
