#!/bin/sh
# The README's C example is part of examples/forward.c, line by line and in order.
# Usage: test_readme.sh SOURCE
set -eu
cd "$1"
awk '/^```c$/ { inside = 1; next } /^```$/ { inside = 0 } inside && NF' README.md |
    awk 'FNR == NR { want[++wanted] = $0; next }
         found < wanted && $0 == want[found + 1] { found++ }
         END {
             if (wanted == 0 || found < wanted) {
                 print "README.md: not in examples/forward.c: " want[found + 1]
                 exit 1
             }
         }' - examples/forward.c
