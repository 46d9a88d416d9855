# shellcheck shell=sh
# Sourced by the tests that compile kernels themselves.

# clangs: every clang that is installed, the newest first.
clangs() {
    number=40
    while [ $number -ge 14 ]; do
        command -v clang-$number || true
        number=$((number - 1))
    done
    command -v clang || true
}
