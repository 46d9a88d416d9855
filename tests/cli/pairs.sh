#!/bin/sh
# Every pair of a command's options, as its --help lists them: both are taken, or one is refused by name.
# Usage: pairs.sh "PROGRAM [COMMAND]" [A+B | A:B,C]...
# A+B: A does not go with B. A:B,C: A needs B or C. All other pairs go together.
set -eu
command=$1
shift
rules=" $* "
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

# with_value OPTION: the option with a value that is right.
with_value() {
    case $1 in
    layer | device | seed) value=0 ;;
    tolerance | capacity-factor | repeat | gamma | steps | tokens) value=1 ;;
    replicas | devices | nodes | groups | max-moves) value=1 ;;
    output | csv | tune | gradients | plan | report) value=- ;;
    previous | text | input | tensor | expect | assume | dy | expect-gradients) value=some ;;
    dtype | decode | gradient-type) value=f32 ;;
    engine) value=ref ;;
    loss) value=z ;;
    controller) value=bias ;;
    kappa | device-groups) value=1 ;;
    beta) value=0 ;;
    centred) value=delta ;;
    case) value=tiny ;;
    step) value=plan ;;
    pattern | force-routing) value=zipf ;;
    peer) value=openblas ;;
    json) case $command in *bench* | *selftest | *trace) value=- ;; *) value= ;; esac ;;
    *) value= ;;
    esac
    echo "--$1 $value"
}

# lacks A B: whether A needs another option than B.
lacks() {
    for rule in $rules; do
        case $rule in "$1:"*) case ",${rule#*:}," in *",$2,"*) return 1 ;; *) return 0 ;; esac ;; esac
    done
    return 1
}

# Whether the two go together.
together() {
    case $rules in *" $1+$2 "* | *" $2+$1 "*) return 1 ;; esac
    ! lacks "$1" "$2" && ! lacks "$2" "$1"
}

# shellcheck disable=SC2086
options=$($command --help | sed -n 's/^  --\([a-z-]*\).*/\1/p' | grep -vx -e help -e version)
# What is said of a word too many; of a command that takes words, of the first.
last="unexpected argument"
case $command in *compare) last="'one' is no folder" ;; esac
[ "$(echo "$options" | wc -w)" -gt 1 ] || { echo "no options in the help" >&2; exit 1; }
failed=0
for a in $options; do
    for b in $options; do
        # A word too many is refused once the options are right.
        code=0
        # shellcheck disable=SC2046,SC2086
        $command $(with_value "$a") $(with_value "$b") one two >"$tmp/out" 2>"$tmp/err" || code=$?
        if [ "$a" = "$b" ] && [ "$a" != loss ] && [ "$a" != text ]; then want="--$a is given twice"
        elif [ "$a" = "$b" ] || together "$a" "$b"; then want=$last
        else want="--$a .*--$b\|--$b .*--$a\|--$a needs\|--$b needs"; fi
        [ $code = 2 ] && [ ! -s "$tmp/out" ] && grep -q -e "$want" "$tmp/err" || {
            echo "--$a and --$b: exit $code: $(cat "$tmp/err")" >&2
            failed=1
        }
    done
done
exit $failed
