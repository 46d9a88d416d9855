#!/bin/sh
# The rules of the code that a compiler does not check. Usage: test_style.sh SOURCE
set -eu
cd "$1"
failed=0

# complain SENTENCE LINES: fails if there are any.
complain() {
    [ -n "$2" ] || return 0
    printf '%s:\n%s\n' "$1" "$2" >&2
    failed=1
}

# search PATTERN FILE...: matching lines that are not comments.
search() {
    pattern=$1
    shift
    grep -nE "$pattern" "$@" /dev/null | grep -vE '^[^:]*:[0-9]+: *(/?\*|//)' || true
}

library=$(find src -name '*.[ch]' -not -path 'src/cli/*')
code=$(for d in src tests bench examples include; do [ ! -d $d ] || find $d -name '*.[ch]'; done)

# without FILE...: the library's files but these.
without() {
    list=$library
    for name in "$@"; do list=$(printf '%s\n' "$list" | grep -vx "$name"); done
    printf '%s\n' "$list"
}

# --- Layers: a file includes only what lies at or below it ------------------------------------
# level FILE: 0 status, 1 the OpenCL floor and files, 2 engines, 3 layer, 4 steps, 5 pipeline, 6 tool
level() {
    case $1 in
    src/status.* | src/printable.* | src/types.* | src/sources.h | *clmoe/*.h | *.clh | kernels.c) echo 0 ;;
    src/context.* | src/tuning.* | src/device.* | src/program.* | src/cache.* | src/launch.* | src/profile.*) echo 1 ;;
    src/io/*) echo 1 ;;
    src/gemm/*) echo 2 ;;
    src/layer.* | src/check*.[ch] | src/workspace.*) echo 3 ;;
    src/steps.h | src/score.c | src/topk.c | src/plan.c | src/dispatch.c | src/experts.c | \
        src/combine.c | src/balance.c | src/stats.c | src/loss.c | src/noise.c | src/sums.c | src/sinkhorn.c | \
        src/expert_choice.c | src/soft.c | src/two_level.c | src/rebalance.c | src/reroute.c | src/state.c | \
        src/control.c | src/soft_moe.c | src/joint.c) echo 4 ;;
    src/cli/*) echo 6 ;;
    src/*) echo 5 ;;
    esac
}
for file in $(find src -name '*.[ch]'); do
    for header in $(sed -n 's/^#include "\(.*\)".*/\1/p' "$file"); do
        target=$(realpath -m --relative-to=. "$(dirname "$file")/$header")
        [ -e "$target" ] || target=$header
        if [ -e "src/$target" ]; then target=src/$target; fi
        if [ "$(level "$target")" -gt "$(level "$file")" ]; then
            complain "a lower layer includes an upper one" "$file: $header"
        fi
    done
done
# shellcheck disable=SC2046 # file names have no spaces
complain "src/io needs no device but for the upload" \
    "$(search '#include "\.\./(context|program|launch|layer|gemm)' $(find src/io -name '*.[ch]'))"

# The calls of steps.h that one step's file makes to another's: CALLER>CALLED.
allowed="score>noise score>two_level topk>expert_choice topk>sinkhorn topk>soft topk>two_level
    topk>rebalance sinkhorn>topk plan>reroute two_level>score joint>two_level sums>noise sums>score
    sums>joint loss>joint balance>sums balance>stats balance>loss
    stats>balance loss>balance"
calls=$(sed -nE 's/^(clmoe_status|uint32_t) ([a-z_0-9]+)\(.*/\2/p' src/steps.h | while read -r name; do
    home=$(grep -lE "^[a-z].*\b$name\(" src/*.c)
    for caller in $(grep -lE "^ +([^ */].*)?\b$name\(" src/*.c); do
        [ "$(level "$caller")" != 4 ] || [ "$caller" = "$home" ] ||
            echo "$(basename "$caller" .c)>$(basename "$home" .c)"
    done
done | sort -u)
# shellcheck disable=SC2086,SC2116
complain "steps meet in forward.c, but for the calls that $0 lists; this one is not among them" \
    "$(for call in $calls; do case " $(echo $allowed) " in *" $call "*) ;; *) echo "$call" ;; esac; done)"
# shellcheck disable=SC2086,SC2116
complain "calls between steps that $0 lists, and nobody makes" \
    "$(for call in $allowed; do case " $(echo $calls) " in *" $call "*) ;; *) echo "$call" ;; esac; done)"
complain "the oracle shares nothing with src/" \
    "$(search '#include ".*(src/|status|context|launch|layer|gemm|steps)' tests/ref*)"

# --- Who may do what ----------------------------------------------------------------------------
# shellcheck disable=SC2046
{
    complain "only launch.c enqueues; and upload.c, which fills the buffers it makes" \
        "$(search '\bclEnqueue' $(without src/launch.c src/io/upload.c))"
    complain "only program.c builds programs" \
        "$(search '\bcl(BuildProgram|CreateProgram|CompileProgram)' $(without src/program.c))"
}
complain "the library reads no environment" "$(search '\bgetenv *\(' $library)"
# shellcheck disable=SC2046
complain "the library prints nothing but what it is asked to print, and never exits" \
    "$(search '\b(printf|puts|putchar|fprintf|vprintf|perror|abort|exit|_Exit|assert) *\(' \
        $(without src/stats_print.c))"
complain "kernels use no fast mathematics and no float atomics" \
    "$(search '\bnative_|\bhalf_|fast-math|fast-relaxed|mad-enable|unsafe-math|atom(ic)?_xchg' \
        cl/* $library)"
# shellcheck disable=SC2046
complain "kernels of GROUP work-items use group_barrier(), see cl/group.clh" \
    "$(search '\bbarrier\(' $(find cl -type f ! -name 'gemm_*' ! -name 'nv_*' ! -name group.clh))"
complain "a value of tmp that lives behind a barrier is taken by READ_ONCE(), see cl/group.clh" \
    "$(search '(\w \*?\w+ =|\?|\*total =|same =) \(?tmp\[' cl/*)"

# --- Sizes --------------------------------------------------------------------------------------
# shellcheck disable=SC2086
complain "files of 700 lines or more" \
    "$(wc -l $code cl/* | awk '$2 != "total" && $1 >= 700')"
# LINES FILE:NAME of every function; the code is laid out by clang-format.
# shellcheck disable=SC2086
lengths=$(awk '
    FNR == 1 { start = body = 0 }
    !body && /^[A-Za-z_]/ { start = /\(/ ? FNR : 0; name = $0; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name) }
    start && !body && /\) \{$/ { body = 1 }
    /;$/ && !body { start = 0 }
    /^}/ { if (body) print FNR - start + 1, FILENAME ":" name; start = body = 0 }
' $(printf '%s\n' $code) cl/* bench/*.cl* | sort -n)
complain "functions of more than 70 lines" "$(printf '%s\n' "$lengths" | awk '$1 > 70')"
printf '%s\n' "$lengths" | grep ' src/' | awk '
    { n[NR] = $1; last = $0 }
    END { print "functions of src/: " NR ", lines median " n[int((NR + 1) / 2)] \
          ", p90 " n[int(NR * 0.9)] ", longest " last }'
# shellcheck disable=SC2086
printf 'largest file: %s\n' "$(wc -l $code cl/* | grep -v total | sort -n | tail -1 | xargs)"
[ ! -e src/forward.c ] || printf 'forward.c: %s lines\n' "$(wc -l <src/forward.c)"

# --- Kernels: layout ------------------------------------------------------------------------------
complain "lines of cl/ over 100 columns" \
    "$(awk 'length > 100 { print FILENAME ":" FNR }' cl/* bench/*.cl bench/*.clh)"
words="Purpose Formula Arrays NDRange Limits Repeatability"
complain "kernel files whose first comment is not: $(echo $words | sed 's/ /: ..., /g'): ..." \
    "$(for file in cl/*.cl bench/*.cl; do
        found=$(sed -n '\|^ \*/|q; s/^ \* \([A-Z][A-Za-z]*\): .*/\1/p' "$file" | xargs)
        [ "$found" = "$words" ] || echo "$file: $found"
    done)"

complain "barriers against the rules of cl/types.clh" \
    "$(awk -f tests/barriers.awk cl/* bench/*.cl cl/* cl/* pass=2 cl/* bench/*.cl)"

# --- Format: only with the version that laid out the code ----------------------------------------
format=$(command -v clang-format-14 || true)
if [ -n "$format" ]; then
    # shellcheck disable=SC2086
    complain "not as clang-format-14 has it" "$($format --dry-run -Werror $code 2>&1 | grep error || true)"
fi
exit $failed
