#!/bin/sh
# clmoe trace: what it counts, writes and refuses, on a tiny model of 20 steps.
set -eu
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/html.sh"
device=$(device_option)
run=$tmp/run

# Pictures take their time: without gnuplot but where they are looked at.
with_gnuplot=$PATH
mkdir "$tmp/bin"
printf '#!/bin/sh\nexit 127\n' >"$tmp/bin/gnuplot"
chmod +x "$tmp/bin/gnuplot"
PATH=$tmp/bin:$PATH

# Two texts whose bytes are of classes of their own, and one of a few bytes.
awk 'BEGIN { for (i = 0; i < 800; i++) printf "gentle horse" }' /dev/null >"$tmp/words"
awk 'BEGIN { for (i = 0; i < 800; i++) printf "%d, %d;\n", i * i, i * 7 }' >"$tmp/numbers"
printf 'abc0123456789012345z' >"$tmp/few"

# train NAME OPTION...: a run in $tmp/NAME.
train() {
    name=$1
    shift
    # shellcheck disable=SC2086
    run_exit 0 train --text "$tmp/words" --text "$tmp/numbers" --dim 16 --hidden 8 --experts 4 \
        --context 4 --batch 64 --sequence 16 --steps 20 --out "$tmp/$name" $device "$@"
}

# trace CODE OPTION...: of $run, both texts.
trace() {
    want=$1
    shift
    # shellcheck disable=SC2086
    run_exit "$want" trace "$run" --text "$tmp/words" --text "$tmp/numbers" --tokens 1000 $device "$@"
}

# refused PATTERN ARGUMENT...: exit 2 with one sentence that has the pattern, and nothing on stdout.
refused() {
    pattern=$1
    shift
    run_exit 2 "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $*"
    [ ! -s "$tmp/out" ] || complain "output on stdout: $*"
}

# check_json K: the lines of $tmp/json are what they should be; K 0: any number of experts per token.
check_json() {
    [ "$(wc -l <"$tmp/json")" = 10 ] || complain "not two layers of four experts"
    [ "$(grep -c '"kind":"expert"' "$tmp/json")" = 8 ] || complain "not eight experts"
    command -v python3 >/dev/null || return 0
    python3 - "$tmp/json" "$1" <<'PY' || complain "the JSON lines are not what they should be"
import json, sys
from math import log2
rows = [json.loads(line) for line in open(sys.argv[1])]
top_k = int(sys.argv[2])
for layer in (row for row in rows if row["kind"] == "layer"):
    experts = [r for r in rows if r["kind"] == "expert" and r["layer"] == layer["layer"]]
    assert layer["tokens"] == 2000 and layer["step"] == 20 and len(experts) == layer["experts"] == 4
    assert sum(e["pairs"] for e in experts) == layer["pairs"]
    assert layer["pairs"] == 2000 * top_k if top_k else abs(layer["pairs"] / 4000 - 1) < 0.1
    for e in experts:
        classes = list(e["class_pairs"].values())
        assert sum(classes) == sum(e["text_pairs"]) == e["pairs"]
        assert abs(e["load"] - e["pairs"] / layer["pairs"]) < 1e-8
        assert top_k > 0 or abs(e["load"] - 0.25) < 0.03 # each takes its C of a batch
        for shares in (list(e["class_shares"].values()), e["text_shares"]):
            assert abs(sum(shares) - 1) < 1e-6 if e["pairs"] else shares == [None] * len(shares)
        # words has letters and blanks alone, numbers all the rest and blanks.
        p = e["class_pairs"]
        assert p["upper"] == p["other"] == 0 and p["lower"] <= e["text_pairs"][0]
        assert p["digit"] + p["punctuation"] + p["newline"] <= e["text_pairs"][1]
    if top_k > 0:
        assert [sum(e["text_pairs"][i] for e in experts) for i in (0, 1)] == [1000 * top_k] * 2
    for name, counts in (("class", [list(e["class_pairs"].values()) for e in experts]),
                         ("text", [e["text_pairs"] for e in experts])):
        total, mutual = layer["pairs"], 0
        for row in counts:
            for column, n in enumerate(row):
                of_label = sum(r[column] for r in counts)
                mutual += n / total * log2(n * total / sum(row) / of_label) if n else 0
        about = layer[name]
        assert abs(about["mutual_information"] - mutual) < 1e-6, (name, mutual, about)
        assert 0 <= about["mutual_information"] <= about["entropy"] + 1e-9
        assert abs(about["normalised"] * about["entropy"] - mutual) < 1e-6
        assert 0 <= about["shuffled_mean"] < 0.05 and about["shuffles"] == 20
PY
}

train run
trace 0 --json "$tmp/json" --csv "$tmp/csv"
check_json 2
grep -q '^layer 1$' "$tmp/out" || complain "no second layer in the tables"
[ "$(grep -c '^ *all  *4000  *100.0 ' "$tmp/out")" = 2 ] || complain "no 4000 pairs in each layer"
[ "$(grep -c 'expert and text: ' "$tmp/out")" = 2 ] || complain "no information of the texts"
awk -F, 'NR == 1 { bad = $0 != "layer,expert,pairs,load,lower,upper,digit,punctuation,space,newline,other,text_0,text_1"; next }
    { pairs += $3; load += $4; classes = 0; for (i = 5; i <= 11; i++) classes += $i
      if ($3 > 0 && (classes < 0.9998 || classes > 1.0002 || $12 + $13 < 0.9999 || $12 + $13 > 1.0001)) bad = 1 }
    END { exit bad || NR != 9 || pairs != 8000 || load < 1.9999 || load > 2.0001 }' "$tmp/csv" ||
    complain "the CSV is not what it should be"
grep -v '"kind":"layer"' "$tmp/json" >"$tmp/experts"
PATH=$with_gnuplot
trace 0 --json -
cmp -s "$tmp/out" "$tmp/json" || complain "another run, or -, gives other bytes"

# The folder keeps the trace, and its report has it as pictures.
heats() {
    grep -c '^<h2>What the experts of layer [0-9]* get</h2>' "$run/report.html" || true
}
grep -v '"kind":"layer"' "$run/trace.jsonl" | cmp -s - "$tmp/experts" || complain "trace.jsonl is not what --json writes"
whole "$run/report.html"
pictures "$run/report.html" 9
[ "$(heats)" = 2 ] || complain "no picture of each layer"
grep -q "^<tr><td>text 1</td><td>$tmp/numbers</td></tr>" "$run/report.html" || complain "the texts have no names"
grep -q '^<p>By clmoe trace after step 20, of 2000 tokens:</p>' "$run/report.html" || complain "the trace has no step"
grep -o '"class":{"mutual_information":[0-9.e-]*' "$tmp/json" | sed 's/.*://' | while read -r bits; do
    grep -q "<td>class</td><td class=\"n\">$(printf %.5f "$bits")</td>" "$run/report.html" || echo "$bits"
done >"$tmp/missing"
[ ! -s "$tmp/missing" ] || complain "the report lacks the mutual information $(cat "$tmp/missing")"
if command -v gnuplot >/dev/null; then
    # A number of a cell: the share that an expert has of the first text.
    share=$(awk -F'"text_shares":' '/text_shares":.[0-9]/ { split($2, s, /[][,]/); printf "%.*f\n", 100 * s[2] < 9.95, 100 * s[2] }' "$tmp/experts" | head -1)
    sed -n '/^<h2>What the experts of layer 0/,/<\/figure>/p' "$run/report.html" >"$tmp/map"
    grep -q ">$share<" "$tmp/map" || complain "the picture has no cell of $share %"
    # Neither upper case nor others: grey. A row has six cells, then the first text's: red above 50 %.
    [ "$(grep -c "polygon fill = 'rgb(204, 204, 204)'" "$tmp/map")" -ge 8 ] || complain "no grey cells"
    sed -n "s/.*polygon fill = 'rgb( *\([0-9]*\), *[0-9]*, *\([0-9]*\))'.*/\1 \2/p" "$tmp/map" |
        awk -v share="$share" 'NR == 7 { exit share > 50 ? $1 <= $2 : $1 >= $2 }' ||
        complain "the colour of $share % is on the wrong side"
fi
PATH=$tmp/bin:$PATH
trace 0 --json - --seed 1
cmp -s "$tmp/out" "$tmp/json" && complain "the seed of the shuffles changes nothing"
[ "$(grep -v '"kind":"layer"' "$tmp/out")" = "$(grep -v '"kind":"layer"' "$tmp/json")" ] ||
    complain "the seed changes the counts"

# One that is not the run's is named in a sentence.
misfit() {
    # shellcheck disable=SC2086
    run_exit 0 train --resume "$run" $device
    [ "$(heats)" = 0 ] || complain "a picture of a trace that does not fit: $1"
    grep -q "^<p class=\"missing\">The trace is left out. trace.jsonl: .*$1.*\.</p>$" "$run/report.html" ||
        complain "no sentence with '$1': $(grep 'The trace' "$run/report.html")"
}
cp "$run/trace.jsonl" "$tmp/kept"
head -c 1500 "$tmp/kept" >"$run/trace.jsonl"
misfit "it ends in line [0-9]*, before all experts"
sed 's/"experts":4/"experts":5/' "$tmp/kept" >"$run/trace.jsonl"
misfit "it has 5 experts, the run 4"
cat "$tmp/kept" "$tmp/kept" >"$run/trace.jsonl"
misfit "it has more than the run"
awk 'NR == 3 { sub(/"lower":[0-9]*/, "\"lower\":-1") } { print }' "$tmp/kept" >"$run/trace.jsonl"
misfit "line 3 is no expert"
cp "$tmp/kept" "$run/trace.jsonl"
# shellcheck disable=SC2086
run_exit 0 train --resume "$run" $device
[ "$(heats)" = 2 ] || complain "a run that goes on drops the trace"

# One text: nothing is said of sources. Neither the last sequence nor the last batch is filled.
# shellcheck disable=SC2086
run_exit 0 trace "$run" --text "$tmp/words" --tokens 9575 --csv - --json "$tmp/one" $device
grep -q '"pairs":19150,.*"text":null' "$tmp/one" || complain "not 9575 tokens of one text"
cmp -s "$tmp/one" "$run/trace.jsonl" || complain "the folder does not keep the last trace"
! grep -q '<td class="n">0</td><td>text</td>' "$run/report.html" || complain "the report has information on one text"
head -1 "$tmp/out" | grep -q ',text_0$' || complain "no CSV of one text on standard output"

# Tokens are the bytes from the context's last to the one before the end.
# shellcheck disable=SC2086
run_exit 0 trace "$run" --text "$tmp/few" --tokens 16 --csv - $device
awk -F, '{ digits += $3 * $7 } END { exit digits < 63.99 || digits > 64.01 }' "$tmp/out" ||
    complain "the tokens of a text of 20 bytes are not its digits"

# Expert choice: a token has any number of experts. A rule's bias is the saved state's.
train chosen --balance expert-choice
run=$tmp/chosen
trace 0 --json "$tmp/json" --force
check_json 0
for method in all soft-moe; do
    cp -r "$tmp/run" "$tmp/$method"
    sed "s/\"--steps\"/\"--balance\", \"$method\", &/" "$tmp/run/run.json" >"$tmp/$method/run.json"
    refused "the run has --balance $method: every token passes all experts" trace "$tmp/$method" --text "$tmp/words" --tokens 100
done
run=$tmp/run

# What is refused.
refused "DIR is missing" trace
refused "text is missing" trace "$run"
refused "'more'" trace "$run" more --text "$tmp/words"
refused "'$tmp/none' is no folder of a run" trace "$tmp/none" --text "$tmp/words"
refused "text '$tmp/none' cannot be read" trace "$run" --text "$tmp/none"
refused "text '$tmp' is not a regular file" trace "$run" --text "$tmp"
refused "text '$tmp/few' has 20 bytes, but --tokens 17 in sequences of 16 needs 36" trace "$run" --text "$tmp/few" --tokens 17
refused "text '$tmp/words' has 9600 bytes, but --tokens 65536 " trace "$run" --text "$tmp/words"
refused "tokens is '0'" trace "$run" --text "$tmp/words" --tokens 0
refused "tokens is '1048577'" trace "$run" --text "$tmp/words" --tokens 1048577
refused "seed is '-1'" trace "$run" --text "$tmp/words" --seed -1
refused "force needs --json or --csv" trace "$run" --text "$tmp/words" --force
refused "both write to standard output" trace "$run" --text "$tmp/words" --json - --csv -
refused "same file as --csv" trace "$run" --text "$tmp/words" --json "$tmp/new" --csv "$tmp/new"
refused "csv' exists already" trace "$run" --text "$tmp/words" --csv "$tmp/csv"
refused "same file as --text" trace "$run" --text "$tmp/words" --csv "$tmp/words" --force
sum=$(cksum "$run"/*)
for file in run.json state.safetensors metrics.csv model.safetensors config.json report.html trace.jsonl; do
    refused "is a file of the run" trace "$run" --text "$tmp/words" --json "$run/$file" --force
done
[ "$sum" = "$(cksum "$run"/*)" ] || complain "a refused trace changed the run"
cp -r "$run" "$tmp/broken"
head -c 2000 "$run/state.safetensors" >"$tmp/broken/state.safetensors"
refused "state.safetensors" trace "$tmp/broken" --text "$tmp/words" --tokens 100
rm "$tmp/broken/state.safetensors"
refused "has no step that was saved: $tmp/broken/state.safetensors" trace "$tmp/broken" --text "$tmp/words"
echo '{}' >"$tmp/broken/run.json"
refused "run.json" trace "$tmp/broken" --text "$tmp/words"
finish
