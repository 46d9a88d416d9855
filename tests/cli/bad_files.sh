#!/bin/sh
# Broken files: each is exit 2 with one sentence that names the file and what is wrong with it.
set -eu
. "$(dirname "$0")/lib.sh"
good=$DATA/qwen3_moe
x=model.layers.0.mlp.x
model=$tmp/model
assume=

# expect_bad PATTERN...: clmoe run refuses $model, or $input, and the sentence has the patterns.
expect_bad() {
    run_exit 2 run "$model" --layer 0 --input "$input" --tensor $x ${assume:+--assume "$assume"}
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence for: $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout for: $*"
    for pattern in "$@"; do
        grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence"
    done
    cat "$tmp/err"
}

reset_model() {
    rm -rf "$model"
    mkdir "$model"
    cp "$good/config.json" "$good/model.safetensors" "$model"
    input=$good/activations.safetensors
}

echo "== safetensors files"
for kind in input model; do
    # place: makes the file of write_file the input or the model's.
    place() {
        [ $kind = input ] || { cp "$tmp/bad.safetensors" "$model/model.safetensors"; input=$good/activations.safetensors; }
    }
    name=bad.safetensors
    [ $kind = input ] || name=model.safetensors
    reset_model
    : >"$tmp/bad.safetensors"; input=$tmp/bad.safetensors; place; expect_bad $name
    printf 'abc' >"$tmp/bad.safetensors"; input=$tmp/bad.safetensors; place; expect_bad $name
    { le64 1000; printf '{'; } >"$tmp/bad.safetensors"; input=$tmp/bad.safetensors; place; expect_bad $name
    { printf '\000\000\000\000\000\000\000\020'; printf '{}'; } >"$tmp/bad.safetensors"
    input=$tmp/bad.safetensors; place; expect_bad $name
    write_file '{"a":' 0; place; expect_bad $name
    write_file '[]' 0; place; expect_bad $name
    write_file "{$(entry $x 0 384)}" 383; place; expect_bad $name $x
    write_file "{$(entry $x 0 4000)}" 384; place; expect_bad $name $x
    write_file "{$(entry $x 384 0)}" 384; place; expect_bad $name $x
    write_file "{$(entry $x -384 0)}" 384; place; expect_bad $name $x
    write_file "{$(entry $x 0 384 '[3,48]')}" 384; place; expect_bad $name $x
    write_file "{$(entry $x 0 384 '[-2,-48]')}" 384; place; expect_bad $name $x
    write_file "{$(entry $x 0 384 '[4294967296,4294967296,96]')}" 384; place; expect_bad $name $x
    write_file "{$(entry $x 0 384),$(entry other 380 764)}" 764; place; expect_bad $name
    write_file "{$(entry $x 0 384),$(entry $x 384 768)}" 768; place; expect_bad $name
    write_file "{\"$x\":{\"dtype\":\"F32\"}}" 384; place; expect_bad $name $x
    write_file "{\"$x\":[]}" 384; place; expect_bad $name $x
    write_file "{\"a\":$(head -c 20000 /dev/zero | tr '\0' '[')" 0; place; expect_bad $name
done
reset_model
write_file "{$(entry $x 0 96 '[2,48]' U8)}" 96; expect_bad $x
write_file "{$(entry $x 0 384 '[96]')}" 384; expect_bad $x
write_file "{$(entry $x 0 384 '[4,24]')}" 384; expect_bad $x
write_file "{$(entry other 0 384)}" 384; expect_bad $x
reset_model
head -c 100000 "$good/model.safetensors" >"$model/model.safetensors"; expect_bad model.safetensors
reset_model
rm "$model/model.safetensors"; expect_bad "$model"

echo "== config.json"
# config SED-SCRIPT: edits the good configuration.
config() {
    reset_model
    sed "$1" "$good/config.json" >"$model/config.json"
}
config '/num_local_experts/d'; expect_bad config.json expert
config 's/"num_local_experts": 16/"num_local_experts": 0/'; expect_bad config.json num_local_experts
config 's/"num_local_experts": 16/"num_local_experts": -16/'; expect_bad config.json num_local_experts
config 's/"num_local_experts": 16/"num_local_experts": "16"/'; expect_bad config.json num_local_experts
config 's/"num_local_experts": 16/"num_local_experts": 16.5/'; expect_bad config.json num_local_experts
config 's/"num_local_experts": 16/"num_local_experts": 99999999999/'; expect_bad config.json num_local_experts
config 's/"num_local_experts": 16/"num_local_experts": 17/'; expect_bad "$model"
config 's/"num_local_experts": 16/"num_local_experts": 15/'; expect_bad "$model"
config 's/"num_experts_per_tok": 4/"num_experts_per_tok": 17/'; expect_bad 17 16
config 's/"num_experts_per_tok": 4/"num_experts_per_tok": -4/'; expect_bad config.json num_experts_per_tok
config 's/"num_experts_per_tok": 4/"num_experts_per_tok": 0/'; expect_bad num_experts_per_tok
assume=pattern
config '/num_experts_per_tok/d; s/"qwen3_moe"/"a_new_moe"/'; expect_bad config.json num_experts_per_tok
assume=
config 's/"hidden_size": 48/"hidden_size": 47/'; expect_bad "$model"
config 's/"hidden_act": "silu"/"hidden_act": "snake"/'; expect_bad config.json hidden_act snake
config 's/"model_type": "qwen3_moe"/"model_type": "a_new_moe"/; /norm_topk_prob/d'
expect_bad config.json a_new_moe --assume
assume=pattern
expect_bad config.json a_new_moe norm_topk_prob
assume=qwen3
expect_bad "assume is 'qwen3'"
assume=
config '$d'; expect_bad config.json
reset_model; : >"$model/config.json"; expect_bad config.json
reset_model; rm "$model/config.json"; expect_bad config.json
reset_model; echo '[]' >"$model/config.json"; expect_bad config.json
reset_model; head -c 100000 /dev/zero | tr '\0' '[' >"$model/config.json"; expect_bad config.json
reset_model; echo '{"model_type": "llama", "hidden_size": 48}' >"$model/config.json"; expect_bad config.json

echo "== tensors of the block"
# Names and shapes are replaced by others of the same length, so that the header stays whole.
tensors() {
    reset_model
    sed "$1" "$good/model.safetensors" >"$model/model.safetensors"
    [ "$(wc -c <"$model/model.safetensors")" = "$(wc -c <"$good/model.safetensors")" ] ||
        complain "the edit changed the length"
}
up=model.layers.0.mlp.experts.3.up_proj.weight
tensors "s/layers\.0\.mlp\.experts\.3\.up_proj/layers.7.mlp.experts.3.up_proj/"
expect_bad $up
tensors "s/layers\.0\.mlp\.gate\.weight/layers.7.mlp.gate.weight/"
expect_bad gate.weight
# One tensor more, of 4 bytes behind all others.
reset_model
length=$(od -An -tu8 -N8 "$good/model.safetensors" | tr -d ' ')
data=$(($(wc -c <"$good/model.safetensors") - 8 - length))
header=$(tail -c +9 "$good/model.safetensors" | head -c "$length" | sed 's/} *$//')
header="$header,$(entry model.layers.0.mlp.experts.3.zz_proj.weight $data $((data + 4)) '[1]')}"
{ le64 ${#header}; printf '%s' "$header"; tail -c $data "$good/model.safetensors"; printf '0123'; } \
    >"$model/model.safetensors"
expect_bad model.layers.0.mlp.experts.3.zz_proj.weight
tensors 's/\("model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight":{"dtype":"F32","shape":\)\[32,48\]/\1[48,32]/'
expect_bad $up
tensors 's/\("model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight":{"dtype":"F\)32/\199/'
expect_bad $up
finish
