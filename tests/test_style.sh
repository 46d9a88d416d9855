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
kernels=$(find cl -type f | sort)
code=$(for d in src tests bench examples include; do [ ! -d $d ] || find $d -name '*.[ch]'; done)

# without FILE...: the library's files but these.
without() {
    list=$library
    for name in "$@"; do list=$(printf '%s\n' "$list" | grep -vx "$name"); done
    printf '%s\n' "$list"
}

# --- Rooms: the folder is the layer; a file includes only what lies at or below it ---------------
level() {
    case $1 in
    *clmoe/*.h | *.clh | kernels.c) echo 0 ;;
    src/runtime/*) echo 1 ;;
    src/io/* | src/experts/gemm/*) echo 2 ;;
    src/check/*) echo 4 ;;
    src/cli/*) echo 7 ;;
    src/*/*) echo 5 ;; # rooms of steps
    src/*.h) echo 3 ;; # the layer
    src/*) echo 6 ;;   # the chain
    esac
}
for file in $(find src -name '*.[ch]'); do
    for header in $(sed -n 's/^#include "\(.*\)".*/\1/p' "$file"); do
        target=$(dirname "$file")/$header
        [ -e "$target" ] || target=src/$header
        if [ "$(level "$target")" -gt "$(level "$file")" ]; then
            complain "a lower room includes an upper one" "$file: $header"
        fi
    done
done
# commit.h is generated.
complain "the tool and the bench include clmoe/*.h, their own headers and the oracle's alone" \
    "$(for file in src/cli/*.[ch] bench/*.[ch]; do
        sed -n 's/^#include "\(.*\)".*/\1/p' "$file" | while read -r header; do
            case $file:$header in
            *:clmoe/*.h | bench/*:../src/cli/*.h | bench/*:../src/cli/*.clh | bench/rows.c:commit.h) ;;
            *:*/*) echo "$file: $header" ;;
            bench/*:ref*.h) [ -e "tests/oracle/$header" ] || [ -e "bench/$header" ] || echo "$file: $header" ;;
            *) [ -e "$(dirname "$file")/$header" ] || echo "$file: $header" ;;
            esac
        done
    done)"
# shellcheck disable=SC2046 # file names have no spaces
complain "src/io needs no device but to copy" \
    "$(search '#include "(runtime/(context|program|launch)|layer|experts)' $(find src/io -name '*.[ch]'))"

steps=$(find src -mindepth 2 -name '*.c' -not -path 'src/runtime/*' -not -path 'src/io/*' \
    -not -path 'src/check/*' -not -path 'src/cli/*' -not -path 'src/experts/gemm/*')
# shellcheck disable=SC2086 # file names have no spaces
complain "rooms of steps meet in the chain alone: one calls another" \
    "$(sed -nE 's/^(clmoe_status|uint32_t) ([a-z_0-9]+)\(.*/\2/p' src/steps.h | while read -r name; do
        home=$(dirname "$(grep -lE "^[a-z].*\b$name\(" $steps)")
        grep -lE "^ +([^ */].*)?\b$name\(" $steps | grep -v "^$home/" | sed "s,$,: $name(),"
    done)"
complain "cl/ROOM/NAME.cl, or NAME_PART.cl, is launched by src/ROOM/NAME.c" \
    "$(find cl -name '*.cl' | while read -r kernel; do
        step=src/${kernel#cl/}
        step=${step%.cl}
        [ -e "$step.c" ] || [ -e "${step%_*}.c" ] || echo "$kernel: there is no $step.c"
    done)"
complain "the oracle shares nothing with src/" \
    "$(search '#include ".*(src/|runtime/|layer|experts/|steps|workspace|check/)' tests/oracle/*)"

# --- Who may do what ----------------------------------------------------------------------------
# shellcheck disable=SC2046
{
    complain "only launch.c enqueues; and upload.c, download.c and the self-test, which copy" \
        "$(search '\bclEnqueue' $(without src/runtime/launch.c src/io/upload.c src/io/download.c \
            src/selftest/device.c))"
    complain "only program.c builds programs" \
        "$(search '\bcl(BuildProgram|CreateProgram|CompileProgram)' $(without src/runtime/program.c))"
}
complain "the library reads no environment" "$(search '\bgetenv *\(' $library)"
# shellcheck disable=SC2086
complain "the library prints nothing and never exits" \
    "$(search '\b(printf|puts|putchar|fprintf|vprintf|perror|abort|exit|_Exit|assert) *\(' $library)"
complain "kernels use no fast mathematics and no float atomics" \
    "$(search '\bnative_|\bhalf_|fast-math|fast-relaxed|mad-enable|unsafe-math|atom(ic)?_xchg' \
        $kernels $library)"
# shellcheck disable=SC2046
complain "kernels of GROUP work-items use group_barrier(), see cl/runtime/group.clh" \
    "$(search '\bbarrier\(' $(find cl -type f ! -path 'cl/experts/gemm/*' ! -name group.clh))"
complain "a value of tmp that lives behind a barrier is taken by READ_ONCE(), see cl/runtime/group.clh" \
    "$(search '(\w \*?\w+ =|\?|\*total =|same =) \(?tmp\[' $kernels)"

# --- Sizes --------------------------------------------------------------------------------------
# shellcheck disable=SC2086
complain "files of 700 lines or more" \
    "$(wc -l $code $kernels | awk '$2 != "total" && $1 >= 700')"
# LINES FILE:NAME of every function; the code is laid out by clang-format.
# shellcheck disable=SC2086
lengths=$(awk '
    FNR == 1 { start = body = 0 }
    !body && /^[A-Za-z_]/ { start = /\(/ ? FNR : 0; name = $0; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name) }
    start && !body && /\) \{$/ { body = 1 }
    /;$/ && !body { start = 0 }
    /^}/ { if (body) print FNR - start + 1, FILENAME ":" name; start = body = 0 }
' $(printf '%s\n' $code) $kernels bench/*.cl src/cli/*.cl* | sort -n)
complain "functions of more than 70 lines" "$(printf '%s\n' "$lengths" | awk '$1 > 70')"
printf '%s\n' "$lengths" | grep ' src/' | awk '
    { n[NR] = $1; last = $0 }
    END { print "functions of src/: " NR ", lines median " n[int((NR + 1) / 2)] \
          ", p90 " n[int(NR * 0.9)] ", longest " last }'
# shellcheck disable=SC2086
printf 'largest file: %s\n' "$(wc -l $code $kernels | grep -v total | sort -n | tail -1 | xargs)"
[ ! -e src/forward.c ] || printf 'forward.c: %s lines\n' "$(wc -l <src/forward.c)"

# --- Kernels: layout ------------------------------------------------------------------------------
complain "lines of cl/ over 100 columns" \
    "$(awk 'length > 100 { print FILENAME ":" FNR }' $kernels bench/*.cl src/cli/*.cl*)"
words="Purpose Formula Arrays NDRange Limits Repeatability"
complain "kernel files whose first comment is not: $(echo $words | sed 's/ /: ..., /g'): ..." \
    "$(for file in $(find cl src/cli -name '*.cl') bench/*.cl; do
        found=$(sed -n '\|^ \*/|q; s/^ \* \([A-Z][A-Za-z]*\): .*/\1/p' "$file" | xargs)
        [ "$found" = "$words" ] || echo "$file: $found"
    done)"

complain "barriers against the rules of cl/runtime/types.clh" \
    "$(awk -f tests/barriers.awk $kernels bench/*.cl $kernels $kernels pass=2 $kernels bench/*.cl)"

# --- Format: only with the version that laid out the code ----------------------------------------
format=$(command -v clang-format-14 || true)
if [ -n "$format" ]; then
    # shellcheck disable=SC2086
    complain "not as clang-format-14 has it" "$($format --dry-run -Werror $code 2>&1 | grep error || true)"
fi
exit $failed
