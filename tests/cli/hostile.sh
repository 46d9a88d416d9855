#!/bin/sh
# Names in files that move a terminal's cursor, or turn the direction of text, are printed as \xNN.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)
good=$DATA/qwen3_moe
model=$tmp/model
escape=$(printf '\033')
turn=$(printf '\342\200\256') # U+202E
c1=$(printf '\302\233')       # U+009B, a control sequence in one character

# clean FILE WHAT: FILE has no control characters but line ends, nor marks that turn text.
clean() {
    if LC_ALL=C tr -d '\n\040-\176\200-\377' <"$1" | grep -q . ||
        grep -q -e "$turn" -e "$c1" "$1"; then
        complain "$2 prints control characters: $(od -c "$1" | head -5)"
    fi
}

# A model_type, as the report and the errors have it.
mkdir "$model"
cp "$good/model.safetensors" "$model"
name="evil\\\\u001b[31m\\\\u001b]0;title\\\\u0007${c1}2J${turn}\\\\r\\\\nclmoe: all is well"
sed "s/\"model_type\": \"qwen3_moe\"/\"model_type\": \"$name\"/" "$good/config.json" >"$model/config.json"
for options in "" "--assume qwen3_moe" "--assume qwen3_moe --json" "--assume qwen3_moe --stats"; do
    for command in run "balance --steps 2"; do
        case $command$options in *balance*--stats) continue ;; esac
        # shellcheck disable=SC2086
        "$CLMOE" $command "$model" --layer 0 --input "$good/activations.safetensors" \
            --tensor model.layers.0.mlp.x $options $device >"$tmp/out" 2>"$tmp/err" || [ "$options" = "" ] ||
            complain "clmoe $command $options"
        [ -n "$options" ] || [ "$(wc -l <"$tmp/err")" = 1 ] || complain "more than one line"
        grep -qi 'x1b\|u001b' "$tmp/out" "$tmp/err" || complain "clmoe $command $options: no name"
        clean "$tmp/out" "clmoe $command $options"
        clean "$tmp/err" "clmoe $command $options"
    done
done

# Other strings of the configuration, and names of tensors.
cp "$good/config.json" "$model"
sed -i "s/\"hidden_act\": \"silu\"/\"hidden_act\": \"\\\\u001b[2J\"/" "$model/config.json"
run_exit 2 run "$model" --layer 0 --input "$good/activations.safetensors" --tensor x
grep -qi 'x1b\|u001b' "$tmp/err" || complain "no hidden_act in the sentence"
clean "$tmp/err" "hidden_act"
cp "$good/config.json" "$model"
write_file "{$(entry 'a\u001b[2J' 0 4000)}" 384
run_exit 2 run "$model" --layer 0 --input "$input" --tensor x
clean "$tmp/err" "a tensor's name"
# Words of the command line, and names of files.
for word in "$escape[2J" "--$escape[2J" "$c1"; do
    run_exit 2 run "$word" "$word"
    clean "$tmp/err" "a word"
    run_exit 2 "$word"
    clean "$tmp/err" "a command"
done
# What is harmless stays as it is.
run_exit 2 run "$tmp/modèle-模型" --layer 0 --input x --tensor y
grep -q 'modèle-模型' "$tmp/err" || complain "a name in UTF-8 is changed"
finish
