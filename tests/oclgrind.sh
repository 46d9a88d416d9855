#!/bin/sh
# Runs a test program under Oclgrind with the given checks; Oclgrind's log is the judge. Exit 77: no Oclgrind.
# usage: oclgrind.sh LOG PROGRAM CHECK...
set -eu
log=$1
program=$2
shift 2
command -v oclgrind >/dev/null || {
    echo "skipped: no Oclgrind"
    exit 77
}
rm -f "$log"
CLMOE_TEST_DEVICE=0 oclgrind "$@" --log "$log" "$program"
if [ -s "$log" ]; then
    head -n 40 "$log"
    exit 1
fi
