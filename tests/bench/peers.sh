#!/bin/sh
# bench/peers without a GPU. Usage: peers.sh CLMOE-BENCH
if ! command -v python3 >/dev/null; then
    echo "skipped: no python3"
    exit 77
fi
export PYTHONDONTWRITEBYTECODE=1
exec python3 "$(dirname "$0")/test_peers.py" "$1"
