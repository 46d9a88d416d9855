#!/bin/sh
# clmoe compare on made-up runs, and the reports: the table against awk, hostile folders, what is drawn.
set -eu
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/html.sh"
work=$tmp/work
mkdir "$work"
cd "$work"

# run_json DIR WORD...: the command line of a run.
run_json() {
    folder=$1
    shift
    {
        printf '{"clmoe": "0.2.0", "command": ["train", "--text", "book.txt", "--out", "away"'
        for word in "$@"; do printf ', "%s"' "$word"; done
        printf '], "texts": []}\n'
    } >"$folder/run.json"
}

# made DIR SEED BALANCE LOSS MAX_VIO [OPTION...]: a run of 3 experts in 2 layers, validated in every third line.
made() {
    mkdir "./$1"
    awk -v seed="$2" -v loss="$4" -v vio="$5" 'BEGIN {
        printf "step,loss,validation_loss,validation_max_vio,max_vio,entropy,drop_rate,dead_experts,tokens_per_s,loss_switch"
        print ",max_vio_0,max_vio_1,share_0_0,share_0_1,share_0_2,share_1_0,share_1_1,share_1_2"
        srand(seed + 7)
        for (i = 1; i <= 30; i++) {
            fall = 2 * exp(-i / 5) + 0.02 * (i == 30)
            a = 0.04 + 0.02 * rand()
            printf "%d,%.6g,", 10 * i, loss + fall + 0.1 * rand()
            if (i % 3 == 0) printf "%.6g,%.6g,", loss + fall, vio + fall
            else printf ",,"
            printf "%.6g,%.6g,%.6g,%d,%.6g,%.6g,", vio, 1 - rand() / 2, rand() / 10, rand() * 3, i == 1 ? 9999 : 900 + 100 * rand(), 1 + rand()
            printf "%.6g,%.6g,%.6g,%.6g,%.6g,0.3,0.3,0.4\n", vio, vio / 2, a, 0.3 - a, 0.7
        }
    }' </dev/null >"./$1/metrics.csv"
    folder=$1 seed=$2 balance=$3
    shift 5
    run_json "./$folder" --experts 3 --top-k 1 --layers 2 --steps 300 --seed "$seed" --balance "$balance" "$@"
}

# cell ROW NAME: of the table that --csv has written to $tmp/out; row 1 is the first run.
cell() {
    awk -F, -v row="$1" -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) n = i }
        NR == row + 1 { print $n }' "$tmp/out"
}

# near ROW NAME WANT: whether a cell is that number.
near() {
    got=$(cell "$1" "$2")
    awk -v got="$got" -v want="$3" 'BEGIN { d = got - want; if (d < 0) d = -d
        exit !(got != "" && want != "" && d <= 1e-6 * (want < 0 ? -want : want) + 1e-9) }' </dev/null ||
        complain "row $1 has $2 '$got' instead of '$3'"
}

# of DIR PROGRAM: awk on the lines of metrics.csv below the names; n lines.
of() {
    awk -F, "NR > 1 { n++; $2" "$1/metrics.csv"
}

# refused PATTERN ARGUMENT...: exit 2 with one sentence that has the pattern, and nothing on stdout.
refused() {
    pattern=$1
    shift
    run_exit 2 compare "$@"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: $*"
    grep -q -e "$pattern" "$tmp/err" || complain "no '$pattern' in the sentence: $*: $(cat "$tmp/err")"
    [ ! -s "$tmp/out" ] || complain "output on stdout: $*"
}

# --- The table against awk
made one 0 none 1.5 2
run_exit 0 compare one --csv -
near 1 final_validation_loss "$(of one 'if ($3 != "") last = $3 } END { print last }')"
near 1 best_validation_loss "$(of one 'if ($3 != "" && (!seen++ || $3 < least)) least = $3 } END { print least }')"
near 1 validation_max_vio "$(of one 'if ($4 != "") last = $4 } END { print last }')"
near 1 dead_experts "$(of one 'last = $8 } END { print last }')"
near 1 drop_rate "$(of one 'd[n] = $7 } END { printf "%.9g", (d[28] + d[29] + d[30]) / 3 }')"
near 1 tokens_per_s "$(of one 'if (n > 1) print $9 }' | sort -g | sed -n 15p)"
near 1 starved_experts "$(of one 'for (i = 0; i < 6; i++) s[n, i] = $(13 + i) } END {
    for (i = 0; i < 6; i++) c += (s[28, i] + s[29, i] + s[30, i]) / 3 < 0.16 / 3; print c }')"
case $(cell 1 best_validation_loss) in "$(cell 1 final_validation_loss)") complain "final is best: the test is blind" ;; esac

# --- Seeds are one row; whatever else differs is another
made two 1 none 1.4 2
made three 2 none 1.7 2
run_exit 0 compare one two three --csv -
[ "$(wc -l <"$tmp/out")" = 2 ] || complain "three seeds are not one row"
near 1 seeds 3
losses=$(for run in one two three; do of $run 'if ($3 != "") last = $3 } END { print last }'; done)
near 1 final_validation_loss "$(echo "$losses" | awk '{ s += $1 } END { printf "%.9g", s / NR }')"
near 1 final_validation_loss_spread "$(echo "$losses" |
    awk '{ x[NR] = $1; s += $1 } END { for (i = 1; i <= NR; i++) v += (x[i] - s / NR) ^ 2; printf "%.9g", sqrt(v / (NR - 1)) }')"
run_exit 0 compare one two three
grep -q '^one  *none  *-  *3  *300  *1\.5[0-9]*+-0\.' "$tmp/out" || complain "no mean and spread in the table"
run_exit 0 compare one one --csv -
[ "$(wc -l <"$tmp/out")" = 3 ] || complain "the same run twice is two seeds"
mkdir other
cp one/metrics.csv other
for words in "--top-k 2" "--dim 32" "--hidden 64" "--shared 8" "--context 8" "--dtype bf16" "--init skewed" \
    "--batch 512" "--sequence 128" "--lr 0.01" "--warmup 5" "--weight-decay 0.2" "--clip 2" \
    "--z-loss 0.1" "--token-entropy 0.1" "--capacity-factor 1" "--noise gumbel" \
    "--noise gaussian:2" "--expert-dropout 0.1" "--router-dropout 0.1" "--hidden-dropout 0.1" "--soft-steps 9" \
    "--top-k-schedule 1:5,2" "--text other.txt" "--balance bias" "--balance switch" "--device 0" "--engine ref" \
    "--capacity-factor 1 --overflow reroute" "--noise gumbel --anneal 5"; do
    balance="--balance none"
    case $words in *--balance\ *) balance= ;; esac
    # shellcheck disable=SC2086
    run_json other --experts 3 --layers 2 --steps 300 --seed 4 $balance $words
    case $words in *top-k*) ;; *) sed -i 's/"--experts"/"--top-k", "1", "--experts"/' other/run.json ;; esac
    run_exit 0 compare one other --csv -
    [ "$(wc -l <"$tmp/out")" = 3 ] || complain "one row for another $words"
done
made switched 1 switch 1.5 2 --capacity-factor 1
for words in "--balance-from 9" --per-sequence "--keep random"; do
    # shellcheck disable=SC2086
    run_json other --experts 3 --top-k 1 --layers 2 --steps 300 --seed 4 --balance switch --capacity-factor 1 $words
    run_exit 0 compare switched other --csv -
    [ "$(wc -l <"$tmp/out")" = 3 ] || complain "one row for another $words"
done
run_json other --experts 3 --top-k 1 --layers 2 --steps 300 --seed 4 --save-every 7
run_exit 0 compare one other --csv -
[ "$(wc -l <"$tmp/out")" = 2 ] || complain "no --balance is not none"
run_json other --experts 3 --top-k 2 --layers 2 --steps 300
run_exit 0 compare one other
grep -q 'top-k 2$' "$tmp/out" || complain "the table does not say in what the runs differ"

# --- A sweep: 0.1 is beaten by 0.01 in both; bias is no part of it
made s0 0 switch:0 1.60 6.0
made s4 0 switch:1e-4 1.55 3.0
made s2 0 switch:0.01 1.50 0.5
made s1 0 switch:0.1 1.58 0.5
made s9 0 switch:1 1.70 0.1
made sb 0 bias:0.01 1.40 0.01
run_exit 0 compare s0 s4 s2 s1 s9 sb --csv -
[ "$(tail -n +2 "$tmp/out" | cut -d, -f1,20,21 | tr '\n' ' ')" = \
    '"s0",0,0 "s4",0,0 "s2",0,1 "s1",0,0 "s9",0,1 "sb",,0 ' ] || complain "the marks are wrong: $(cut -d, -f1,20,21 "$tmp/out")"
run_exit 0 compare s0 s4 s2 s1 s9 sb
[ "$(awk '$NF == "*" { print $1 }' "$tmp/out" | tr '\n' ' ')" = "s2 s9 " ] || complain "the table marks others"
run_exit 0 compare s0 s2 s9 one --json
[ "$(grep -c '"pareto": true' "$tmp/out")" = 2 ] || complain "--json marks others"
[ "$(grep -c '"method": "switch"' "$tmp/out")" = 3 ] || complain "--json has another sweep"
! command -v python3 >/dev/null || python3 -m json.tool "$tmp/out" >/dev/null || complain "--json is no JSON"

# --- The report
run_exit 0 compare s0 s4 s2 s1 s9 sb --report sweep.html
whole sweep.html
pictures sweep.html 3
grep -q 'Quality against balance: the number of switch' sweep.html || complain "no curve of the sweep"
run_exit 0 compare one two --report -
cp "$tmp/out" seeds.html
whole seeds.html
pictures seeds.html 2
! command -v gnuplot >/dev/null || [ "$(grep -c '</i>one, 2 seeds<' seeds.html)" = 2 ] || complain "no name of the seeds"
PATH=$work run_exit 0 compare one s0 --report missing.html
whole missing.html
[ "$(grep -c 'gnuplot-nox' missing.html)" = 2 ] || complain "no word on gnuplot, which is not there"
# One that fails, or says nothing.
mkdir bin
for fake in 'echo "no canvas" >&2; exit 3' 'exit 0' 'kill -9 $$' 'exit 127'; do
    printf '#!/bin/sh\n%s\n' "$fake" >bin/gnuplot
    chmod +x bin/gnuplot
    PATH=$work/bin:$PATH run_exit 0 compare one --report fails.html --force
    whole fails.html
    [ "$(grep -c 'class="missing"' fails.html)" = 2 ] || complain "a gnuplot with '$fake' is not noticed"
    case $fake in echo*) grep -q 'gnuplot failed: no canvas' fails.html || complain "gnuplot's words are lost" ;; esac
done

# --- Hostile names and folders
name='<script>alert(1)<&"'"'"'`$(touch bad)`.csv'
made "$name" 0 none 1.5 2
cp -r "$name" "$(printf 'new\nline')"
run_exit 0 compare "$name" "$(printf 'new\nline')" --report names.html
[ "$(wc -l <"$tmp/out")" = 3 ] || complain "a name breaks the table"
whole names.html
pictures names.html 2
grep -q '&lt;script&gt;alert(1)&lt;&amp;&quot;&#39;' names.html || complain "a name is not escaped"
[ ! -e bad ] || complain "a name was run"
run_exit 0 compare "$name" --json
run_exit 0 compare -- "$name"

# broken PATTERN COMMAND...: what the command makes of metrics.csv is refused.
broken() {
    pattern=$1
    shift
    rm -rf broken
    cp -r one broken
    "$@" <one/metrics.csv >broken/metrics.csv
    refused "$pattern" one broken
}
broken "line 5: max_vio is '1e999'" awk -F, -v OFS=, 'NR == 5 { $5 = "1e999" } 1'
broken "line 5: loss is 'nan'" awk -F, -v OFS=, 'NR == 5 { $2 = "nan" } 1'
broken "line 5: loss is '0x10'" awk -F, -v OFS=, 'NR == 5 { $2 = "0x10" } 1'
broken "line 5: loss is ' 1'" awk -F, -v OFS=, 'NR == 5 { $2 = " 1" } 1'
broken "line 7 has 17 fields, but line 1 has 18" awk 'NR == 7 { sub(/,[^,]*$/, "") } 1'
broken "line 7 has more than the 18 fields" awk 'NR == 7 { $0 = $0 ",1" } 1'
broken "no column 'share_1_2'" cut -d, -f1-17
broken "no column 'max_vio'" sed '1s/,max_vio,/,other,/'
broken "two columns 'loss'" sed '1s/,max_vio,/,loss,/'
broken "'<b>' in line 1" sed '1s/,max_vio,/,<b>,/'
broken "line 4 has the step 20 after 20" sed '4s/^30,/20,/'
broken "has the step 1e+30" sed '4s/^30,/1e30,/'
broken "no whole line" true
broken "has a byte 0" sh -c 'cat; head -c 5 /dev/zero; echo'
rm broken/metrics.csv
mkfifo broken/metrics.csv
refused "no regular file" broken
rm broken/metrics.csv
refused "metrics.csv: No such file" broken
refused "is no folder of a run" "$work"
refused "is no folder of a run" none
refused "is no folder of a run" ""
for json in '' '{' '[]' '{"command": 3}' '{"command": ["train", 7]}' '{"command": ["train", "--steps", "x"]}' \
    '{"command": ["train", "--resume", "one"]}' '{"command": ["train", "--help"]}'; do
    printf '%s' "$json" >broken/run.json
    refused run.json broken
done
# A run that was killed, and one that has only begun.
rm -rf broken
cp -r one broken
head -c -5 one/metrics.csv >broken/metrics.csv
run_exit 0 compare broken --csv -
near 1 steps 290
head -1 one/metrics.csv >broken/metrics.csv
run_exit 0 compare broken one --report begun.html
whole begun.html
grep -q '^broken  *none  *-  *1  *0  *-  *-' "$tmp/out" || complain "a run without a line has figures"
# One whose loss is no number any more has no final one.
awk -F, -v OFS=, 'NR > 20 { $2 = $3 = "" } 1' one/metrics.csv >broken/metrics.csv
run_exit 0 compare broken --csv -
[ -z "$(cell 1 final_validation_loss)" ] || complain "a loss that is gone is final"

# Values that no picture has room for.
awk -F, -v OFS=, 'NR == 4 { $2 = "1e300"; $4 = "-1e300" } NR == 7 { $3 = "inf"; $11 = "1e308"; $12 = "-1e308" } 1' \
    one/metrics.csv >broken/metrics.csv
run_exit 0 compare broken --report begun.html --json --force
whole begun.html
pictures begun.html 2

# --- Options and outputs
refused "DIR is needed"
refused "unknown option" one --cvs -
refused "force needs --csv or --report" one --force
refused "both write to standard output" one --csv - --report -
refused "both write to standard output" one --csv - --json
refused "both write to standard output" one --report - --json
refused "given twice" one --csv a --csv b
refused "same file as --csv" one --csv a --report a
refused "exists already" one --report sweep.html
refused "is a file of the run 'one'" one --csv one/metrics.csv --force
refused "is a file of the run 'one'" two one --report one/run.json --force
refused "is a file of the run 'one'" one --csv one/model.safetensors
run_exit 0 compare one --csv table.csv --report all.html --json
run_exit 0 compare one --csv table.csv --report all.html --force
[ -z "$(find . -name '.clmoe-*')" ] || complain "a temporary file is left"
if [ -e /dev/full ]; then
    for options in "" --json "--csv -" "--report -"; do
        code=0
        # shellcheck disable=SC2086
        "$CLMOE" compare one $options >/dev/full 2>"$tmp/err" || code=$?
        [ $code = 2 ] || complain "exit $code on a full disk: compare $options"
    done
fi
finish
