#!/bin/sh
# Runs an example and looks for a line in what it prints. Usage: run.sh PATTERN COMMAND...
set -eu
pattern=$1
shift
output=$("$@") || {
    printf '%s\n' "$output"
    exit 1
}
printf '%s\n' "$output"
printf '%s\n' "$output" | grep -qE "$pattern" || {
    echo "no line with: $pattern" >&2
    exit 1
}
