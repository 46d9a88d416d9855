# Shared by the tests of the tool; sourced. CLMOE is the tool, DATA the bundled checkpoints.
: "${CLMOE:?}" "${DATA:?}"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
failures=0

# complain SENTENCE...: counts a failure and shows what the last command printed.
complain() {
    echo "FAILED: $*" >&2
    cat "$tmp/err" >&2 2>/dev/null || true
    failures=$((failures + 1))
}

finish() {
    [ "$failures" = 0 ] || echo "$failures failures" >&2
    [ "$failures" = 0 ]
    exit
}

# run_exit CODE ARGUMENT...: runs the tool; its output goes to $tmp/out and $tmp/err.
run_exit() {
    want=$1
    shift
    code=0
    "$CLMOE" "$@" >"$tmp/out" 2>"$tmp/err" || code=$?
    [ "$code" = "$want" ] || complain "exit $code instead of $want: clmoe $*"
}

# --device INDEX for CLMOE_TEST_DEVICE: an index, or part of a platform's or device's name.
device_option() {
    wanted=${CLMOE_TEST_DEVICE-}
    case $wanted in
    '') return ;;
    *[!0-9]*)
        wanted=$("$CLMOE" devices | awk -v part="$wanted" '
            /^[* ][0-9]/ { index_here = substr($1, 1) + 0; if ($1 ~ /^\*/) index_here = substr($1, 2) + 0 }
            /^[* ][0-9]|^    platform/ { if (index(tolower($0), tolower(part))) { print index_here; exit } }')
        [ -n "$wanted" ] || { echo "no device matches CLMOE_TEST_DEVICE" >&2; exit 1; }
        ;;
    esac
    echo "--device $wanted"
}

# recorded_blocks MODEL: the MoE blocks with a recorded input, as in model.layers.0.mlp
recorded_blocks() {
    head -c 8192 "$DATA/$1/activations.safetensors" | LC_ALL=C tr -c '[:print:]' '\n' |
        grep -o '"model\.layers\.[0-9]*\.[a-z_]*\.x"' | sed 's/"\(.*\)\.x"/\1/' | sort -u
}

# block_args MODEL BLOCK: the options that run a block on its recorded input.
block_args() {
    layer=${2#model.layers.}
    echo "$DATA/$1 --layer ${layer%%.*} --input $DATA/$1/activations.safetensors --tensor $2.x"
}

# number KEY: a number or word of the JSON report in $tmp/out.
number() {
    grep -o "\"$1\":[^,}]*" "$tmp/out" | head -1 | sed 's/.*://'
}
