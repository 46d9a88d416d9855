# shellcheck shell=sh disable=SC2034,SC2154
# Shared by the tests of the tool; sourced. CLMOE is the tool, DATA the bundled checkpoints.
: "${CLMOE:?}" "${DATA:?}"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
failures=0
export LC_ALL=C # sed and tr on binary files

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

# Which of the engines ENGINE... run on the device under test.
engines_here() {
    for engine in "$@"; do
        # shellcheck disable=SC2046,SC2086
        if "$CLMOE" run $(block_args qwen3_moe model.layers.0.mlp) --engine "$engine" \
            $(device_option) >/dev/null 2>"$tmp/err"; then
            echo "$engine"
        else
            grep -q "engine $engine needs" "$tmp/err" || complain "engine $engine does not run"
            echo "engine $engine does not run on this device" >&2
        fi
    done
}

# recorded_blocks MODEL: the MoE blocks with a recorded input, as in model.layers.0.mlp
recorded_blocks() {
    head -c 8192 "$DATA/$1/activations.safetensors" | tr -c '[:print:]' '\n' |
        grep -o '"model\.layers\.[0-9]*\.[a-z_]*\.x"' | sed 's/"\(.*\)\.x"/\1/' | sort -u
}

# block_args MODEL BLOCK: the options that run a block on its recorded input.
block_args() {
    layer=${2#model.layers.}
    echo "$DATA/$1 --layer ${layer%%.*} --input $DATA/$1/activations.safetensors --tensor $2.x"
}

# backward_args MODEL: the options that run its block, and back, on the recorded x and dy.
backward_args() {
    block=$(recorded_blocks "$1")
    file=$GRADIENTS/$1.safetensors
    echo "$DATA/$1 --layer 0 --input $file --tensor $block.x --backward --dy $block.dy"
}

# recorded_gradients FILE: how many tensors it has of dx and the block's parameters.
recorded_gradients() {
    head -c 65536 "$1" | tr '{,' '\n\n' | grep -a -c '^"\(grad\.[^"]*\|model\.[^"]*\.dx\)":'
}

# number KEY: a number or word of the JSON report in $tmp/out.
number() {
    grep -o "\"$1\":[^,}]*" "$tmp/out" | head -1 | sed 's/.*://'
}

# le64 NUMBER: as eight bytes, lowest first; numbers below 2^32.
le64() {
    # shellcheck disable=SC2059
    printf "$(printf '\\%03o\\%03o\\%03o\\%03o' $(($1 % 256)) $(($1 / 256 % 256)) \
        $(($1 / 65536 % 256)) $(($1 / 16777216)))\\000\\000\\000\\000"
}

# write_file HEADER [BYTES]: makes $input, a safetensors file with that many zero bytes of data.
write_file() {
    { le64 ${#1}; printf '%s' "$1"; head -c "${2-0}" /dev/zero; } >"$tmp/bad.safetensors"
    input=$tmp/bad.safetensors
}

# A tensor of 2 tokens: entry NAME BEGIN END [SHAPE] [TYPE]
entry() {
    printf '"%s":{"dtype":"%s","shape":%s,"data_offsets":[%s,%s]}' "$1" "${5-F32}" "${4-[2,48]}" "$2" "$3"
}
