#!/bin/sh
# Lines of cl/ that ran in none of the programs of a directory; fails if they are more than one in 200.
# usage: coverage.sh DIRECTORY CL_DIRECTORY; LLVM_PROFDATA and LLVM_COV are the tools.
set -eu
directory=$1
kernels=$2

# FILE LINE COUNT of one program, by the #line directives of its source.
lines_of() {
    "$LLVM_PROFDATA" merge -o "$1.profdata" "$1".*.profraw
    "$LLVM_COV" export -format=lcov -instr-profile="$1.profdata" "$1" >"$1.lcov" 2>"$1.lcov-log" ||
        echo "$1" >>"$directory/unreadable"
    awk -v source="$1.cl" '
        BEGIN {
            while ((getline text < source) > 0) {
                number++
                if (split(text, word, " ") == 3 && word[1] == "#line") {
                    file = substr(word[3], 2, length(word[3]) - 2)
                    line = word[2]
                    continue
                }
                if (text !~ /^#/)
                    place[number] = file " " line
                line++
            }
        }
        /^SF:/ { ours = $0 == "SF:" source }
        /^DA:/ && ours { split(substr($0, 4), at, ","); print place[at[1]], at[2] }' "$1.lcov"
}

for program in "$directory"/*.so; do
    lines_of "$program"
done >"$directory/lines"
# clang 21 writes functions without a name, which its own llvm-cov refuses.
if [ -e "$directory/unreadable" ]; then
    echo "$LLVM_COV reads no coverage of $(wc -l <"$directory/unreadable") programs: the lines are not counted"
    exit 0
fi
awk -v kernels="$kernels" '
    $1 ~ /^cl\// { ran[$1 " " $2] += $3; files[$1] }
    END {
        for (at in ran) {
            split(at, place, " ")
            total[place[1]]++
            hit[place[1]] += ran[at] > 0
            if (!ran[at])
                missed[place[1]] = missed[place[1]] " " place[2]
        }
        list = "cd " kernels " && find . -name '\''*.cl'\'' | sort"
        while ((list | getline name) > 0) {
            sub(/^\.\//, "", name)
            # Assembly of one vendor is not for any device: it comes from these headers, or is marked.
            assembly = system("grep -qE '\''#include .*/nv_(mma|wgmma)\\.clh|//@SM90A'\'' " kernels "/" name) == 0
            if (!assembly && !(("cl/" name) in files)) {
                print "cl/" name ": not in any program"
                failed = 1
            }
        }
        for (file in files) {
            printf "%s: %d of %d lines\n", file, hit[file], total[file]
            lines += total[file]
            hits += hit[file]
            if (missed[file])
                print "    not run:" missed[file]
        }
        printf "kernels: %d of %d lines\n", hits, lines
        exit failed || 200 * hits < 199 * lines
    }' "$directory/lines"
