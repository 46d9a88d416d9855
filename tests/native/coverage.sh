#!/bin/sh
# Lines of cl/ that ran in none of the programs of a directory; fails if they are more than one in 200.
# usage: coverage.sh DIRECTORY CL_DIRECTORY; LLVM_PROFDATA and LLVM_COV are the tools.
set -eu
directory=$1
kernels=$2

# All programs at once: a function of one name and one shape in two of them has the counts of both,
# which are added up below anyway.
"$LLVM_PROFDATA" merge -o "$directory/all.profdata" "$directory"/*.profraw
set --
for program in "$directory"/*.so; do
    [ $# = 0 ] || set -- "$@" -object
    set -- "$@" "$program"
done
# clang 21 writes functions without a name, which its own llvm-cov refuses.
"$LLVM_COV" export -format=lcov -instr-profile="$directory/all.profdata" "$@" >"$directory/all.lcov" \
    2>"$directory/lcov-log" || {
    echo "$LLVM_COV reads no coverage of these programs: the lines are not counted"
    exit 0
}
# FILE LINE COUNT, by the #line directives of the programs' sources.
awk '
    /^SF:/ {
        source = substr($0, 4)
        ours = source ~ /\.so\.cl$/
        number = line = 0
        split("", place)
        while (ours && (getline text < source) > 0) {
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
        close(source)
    }
    /^DA:/ && ours { split(substr($0, 4), at, ","); print place[at[1]], at[2] }' \
    "$directory/all.lcov" >"$directory/lines"
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
            assembly = system("grep -qE '\''#include .*/nv_(mma|wgmma|split|split_tile)\\.clh|//@SM90A'\'' " kernels "/" name) == 0
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
