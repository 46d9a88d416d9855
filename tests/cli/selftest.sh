#!/bin/sh
# clmoe selftest: what it prints and writes, its exit codes, and that it finds a broken kernel. The
# argument is the layer of tests/fault that breaks kernels, if there is one.
set -eu
. "$(dirname "$0")/lib.sh"
device=$(device_option)
layer=--layer=two

# has TEXT FILE
has() {
    grep -q -e "$1" "$2" || complain "no '$1'"
}

# shellcheck disable=SC2086 # the option is two words, or none
run_exit 0 selftest $device $layer
for word in clmoe ABI device driver platform 'two levels 4 of 8 .*f32' ' 0 differ, 0 failed'; do
    has "$word" "$tmp/out"
done
[ ! -s "$tmp/err" ] || complain "words on stderr"

# JSON: one object with all fields; python3 reads it where it is there.
# shellcheck disable=SC2086
run_exit 0 selftest $device $layer --json -
for key in version abi device name type vendor driver opencl opencl_c platform platform_version \
    compute_units memory local_memory largest_buffer work_group results layer batch engine dtype \
    status array against norm_error norm_tolerance worst_error worst_tolerance message summary \
    passed differs failed skipped stopped seconds; do
    has "\"$key\":" "$tmp/out"
done
has '"status": "passed"' "$tmp/out"
cp "$tmp/out" "$tmp/report.json"
if command -v python3 >/dev/null; then
    python3 - "$tmp/report.json" <<'PY' || complain "the JSON is not what it should be"
import json, sys
report = json.load(open(sys.argv[1]))
counts = dict.fromkeys(("passed", "differs", "failed", "skipped"), 0)
for result in report["results"]:
    counts[result["status"]] += 1
    assert result["layer"] == "two levels 4 of 8" and result["dtype"] == "f32"
    assert (result["message"] == "") == (result["status"] == "passed")
    if result["status"] == "passed":
        assert 0 <= result["norm_error"] <= result["norm_tolerance"] < 1e-3
assert all(report["summary"][status] == count for status, count in counts.items()), counts
assert counts["passed"] >= 4 and report["version"].startswith(report["abi"] + ".")
PY
fi

# Into a file: the table too; a file that exists needs --force.
# shellcheck disable=SC2086
run_exit 0 selftest $device $layer --engine ref --json "$tmp/file.json"
has 'batches passed' "$tmp/out"
has '"engine": "ref"' "$tmp/file.json"
grep -q '"engine": "tiled"' "$tmp/file.json" && complain "another engine than ref"
# shellcheck disable=SC2086
run_exit 2 selftest $device $layer --json "$tmp/file.json"
has exists "$tmp/err"
# shellcheck disable=SC2086
run_exit 0 selftest $device $layer --engine ref --json "$tmp/file.json" --force --no-cache

# Bad options: one sentence.
refused() {
    pattern=$1
    shift
    run_exit 2 selftest "$@"
    has "$pattern" "$tmp/err"
    [ "$(wc -l <"$tmp/err")" = 1 ] || complain "not one sentence: clmoe selftest $*"
}
refused "'more'" more
refused "'--jsn'; did you mean --json" --jsn
refused 'needs a value' --json
refused '--force needs --json' --force
refused "'nowhere'" --device nowhere
refused '"warp"' --engine warp
refused '"no such"' --layer 'no such'
refused 'given twice' --layer a --layer b

# A kernel with a wrong number, and one that does not build.
if [ -n "${1-}" ] && OPENCL_LAYERS=$1 CLMOE_BREAK_LOG=$tmp/loaded "$CLMOE" devices >/dev/null &&
    [ -e "$tmp/loaded" ]; then
    export OPENCL_LAYERS="$1" CLMOE_BREAK='weight = row->weights[k];'
    export CLMOE_BROKEN='weight = 1.5f * row->weights[k];'
    # shellcheck disable=SC2086
    run_exit 1 selftest $device $layer --no-cache
    has DIFFERS "$tmp/out"
    has 'y against host: norm 0.5' "$tmp/out"
    # shellcheck disable=SC2086
    run_exit 1 selftest $device $layer --no-cache --json -
    has '"status": "differs"' "$tmp/out"
    export CLMOE_BROKEN='weight = this_is_no_name;'
    # shellcheck disable=SC2086
    run_exit 1 selftest $device $layer --no-cache
    has FAILED "$tmp/out"
    has 'cl/dispatch/combine.cl did not build' "$tmp/out"
    # shellcheck disable=SC2086
    run_exit 1 selftest $device $layer --no-cache --json -
    has '"log": .*this_is_no_name' "$tmp/out"
else
    echo "this loader takes no layers: no kernel was broken" >&2
fi
finish
