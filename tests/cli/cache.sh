#!/bin/sh
# Where the tool keeps compiled programs: in the user's cache directory, or nowhere.
set -eu
. "$(dirname "$0")/lib.sh"

# A platform that keeps programs itself gets no directory.
device=$(device_option)
mark=${device#--device }
platform=$("$CLMOE" devices | awk -v mark="$mark" '
    /^[* ][0-9]/ { here = mark == "" ? /^\*/ : substr($0, 2) + 0 == mark + 0 }
    /^    platform/ && here { sub(/^ *platform */, ""); print }')
kept=yes
[ "$platform" != "Portable Computing Language" ] || kept=
export POCL_CACHE_DIR="${POCL_CACHE_DIR:-$tmp/pocl}"
mkdir -p "$POCL_CACHE_DIR"

# runs DIRECTORY ARGUMENT...: a run, after which DIRECTORY holds programs, or is not there with
# --no-cache.
runs() {
    directory=$1
    shift
    # shellcheck disable=SC2046,SC2086
    run_exit 0 run $(block_args qwen3_moe model.layers.0.mlp) $device "$@"
    case "$kept $*" in
    yes*--no-cache* | ' '*) [ ! -e "$directory" ] || complain "$directory is there after: $*" ;;
    *) [ -n "$(find "$directory" -type f -perm 0600 2>/dev/null)" ] || complain "no programs in $directory" ;;
    esac
}

mkdir "$tmp/xdg" "$tmp/home"
export XDG_CACHE_HOME="$tmp/xdg" HOME="$tmp/home"
run_exit 0 devices --no-cache
runs "$tmp/xdg/clmoe" --no-cache
runs "$tmp/xdg/clmoe"
runs "$tmp/xdg/clmoe"
export XDG_CACHE_HOME="relative"
runs "$tmp/home/.cache/clmoe"
[ ! -e relative ] || complain "a relative XDG_CACHE_HOME was used"

# Trouble with the directory is none of the user's.
export XDG_CACHE_HOME="$tmp/file"
: >"$tmp/file"
# shellcheck disable=SC2046,SC2086
run_exit 0 run $(block_args qwen3_moe model.layers.0.mlp) $device
finish
