#!/bin/sh
# clmoe train leaves report.html in the run's folder, with gnuplot and without.
set -eu
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/html.sh"
device=$(device_option)
cd "$tmp"
for i in $(seq 1 400); do echo "line $i of a text: $((i * i)) is a square"; done >text

# The layers of cli.train, whose compiled kernels are in the cache if that ran before.
# shellcheck disable=SC2086
run_exit 0 train --text text --out run --steps 12 --log-every 1 --validate-every 4 --dim 16 --hidden 16 \
    --context 4 --batch 128 --sequence 32 --balance quantile,switch --noise gaussian:0.1 --hidden-dropout 0.1 $device
whole run/report.html
pictures run/report.html 8
grep -q '<td>Steps</td><td class="n">12 of 12</td>' run/report.html || complain "no figures"
grep -q '<td>balance</td><td>quantile,switch:0.01</td>' run/report.html || complain "no settings"
grep -q '<code>clmoe train --text text --out run --steps 12 ' run/report.html || complain "no command"
for title in Loss "Experts of layer 0" "Experts of layer 1" MaxVio "Entropy of the load" Drops "Dead experts" "Balance losses"; do
    grep -q "^<h2>$title</h2>" run/report.html || complain "no picture '$title'"
done
loss=$(awk -F, '$3 + 0 > 0 { last = $3 } END { printf "%.4f", last }' run/metrics.csv)
grep -q "Validation loss at the end.*<td class=\"n\">$loss</td>" run/report.html || complain "the loss is not $loss"
run_exit 0 compare run
grep -q " $loss " "$tmp/out" || complain "clmoe compare has another loss than $loss"

# Without gnuplot: what is done already is resumed, which writes the report anew.
mkdir bin
for tool in $(printf '%s' "$PATH" | tr : '\n' | while read -r folder; do ls "$folder" 2>/dev/null; done | grep -x 'ld\|cc\|gcc\|clang' | sort -u); do
    ln -s "$(command -v "$tool")" "bin/$tool" # for a driver that calls them
done
# shellcheck disable=SC2086
PATH=$tmp/bin run_exit 0 train --resume run $device
whole run/report.html
[ "$(grep -c 'gnuplot-nox' run/report.html)" = 8 ] || complain "no word on gnuplot, which is not there"
! grep -q '^<svg' run/report.html || complain "pictures without gnuplot"

# One that a signal ends: it does not block those that clmoe waits for.
printf '#!/bin/sh\nkill -TERM $$\n: >survived\n' >bin/gnuplot
chmod +x bin/gnuplot
# shellcheck disable=SC2086
PATH=$tmp/bin run_exit 0 train --resume run $device
grep -q 'gnuplot failed: no reason' run/report.html || complain "no word on gnuplot, which a signal ended"
[ ! -e survived ] || complain "gnuplot blocks SIGTERM"
[ -z "$(find run -name '*.tmp')" ] || complain "a temporary file is left"
finish
