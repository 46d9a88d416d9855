#!/bin/sh
# Installs BUILD under a temporary prefix and links examples/00_forward.c from outside, through CMake's
# find_package and through pkg-config, shared and static; then looks at what the library exports.
# Usage: run.sh SOURCE BUILD CC CFLAGS
set -eu
source=$1 build=$2 cc=$3 cflags=${4-}
here=$source/tests/install
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

cmake --install "$build" --prefix "$tmp/first" >"$tmp/log"
mv "$tmp/first" "$tmp/moved" # nothing may remember the prefix
prefix=$tmp/moved
libdir=$(dirname "$(find "$prefix" -name libclmoe.a)")

echo "== find_package"
cmake -S "$here/downstream" -B "$tmp/downstream" "-DCMAKE_PREFIX_PATH=$prefix" \
    "-DCMAKE_C_COMPILER=$cc" "-DCMAKE_C_FLAGS=$cflags" "-DEXAMPLE=$source/examples/00_forward.c" >>"$tmp/log"
cmake --build "$tmp/downstream" >>"$tmp/log"
"$tmp/downstream/with_clmoe"
"$tmp/downstream/with_clmoe_static"

echo "== pkg-config"
export PKG_CONFIG_PATH=$libdir/pkgconfig
# The header leaves OpenCL 2 to an application that includes it first.
cat >"$tmp/newer.c" <<END
#include <clmoe/clmoe.h>
cl_command_queue queue(cl_context context, cl_device_id device, cl_int *code);
cl_command_queue queue(cl_context context, cl_device_id device, cl_int *code) {
    return clmoe_version() ? clCreateCommandQueueWithProperties(context, device, NULL, code) : NULL;
}
END
# shellcheck disable=SC2046
$cc -std=c11 -Wall -Wextra -Werror $(pkg-config --cflags clmoe) -fsyntax-only "$tmp/newer.c"
# shellcheck disable=SC2046,SC2086 # flags are words
$cc $cflags "$source/examples/00_forward.c" $(pkg-config --cflags --libs clmoe) -o "$tmp/forward"
LD_LIBRARY_PATH=$libdir "$tmp/forward"
# shellcheck disable=SC2046,SC2086
$cc $cflags "$source/examples/00_forward.c" $(pkg-config --cflags --libs --static clmoe |
    sed "s|-lclmoe|$libdir/libclmoe.a|") -o "$tmp/forward_static"
"$tmp/forward_static"

echo "== as a part of another project: the library alone, and nothing to install"
mkdir "$tmp/parent"
cat >"$tmp/parent/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.22)
project(parent LANGUAGES C)
add_subdirectory($source clmoe)
END
cmake -S "$tmp/parent" -B "$tmp/parent/build" "-DCMAKE_C_COMPILER=$cc" "-DCMAKE_C_FLAGS=$cflags" >>"$tmp/log"
cmake --build "$tmp/parent/build" --target help >"$tmp/targets"
grep -q clmoe_static "$tmp/targets"
if grep -E 'clmoe_(tool|bench)|forward|test_' "$tmp/targets" >&2; then exit 1; fi
cmake --install "$tmp/parent/build" --prefix "$tmp/parent/prefix" >>"$tmp/log"
[ ! -e "$tmp/parent/prefix" ] || {
    find "$tmp/parent/prefix" >&2
    exit 1
}

echo "== the README's example is of this program, whole between lines /* ... */"
awk '
    FNR == NR {
        if (/^```/) { inside = /^```c$/; gap = 1 }
        else if (inside && /^ *\/\* \.\.\. \*\/$/) gap = 1
        else if (inside && NF) { quoted[++n] = $0; after_gap[n] = gap; gap = 0 }
        next
    }
    !NF { next }
    at < n && $0 == quoted[at + 1] { at++; next }
    at < n && !after_gap[at + 1] && !bad { bad = "after \"" quoted[at] "\" without: " $0 }
    END {
        if (!n) bad = "no example"
        if (!bad && at < n) bad = "not in 00_forward.c: " quoted[at + 1]
        if (bad) { print "README.md: " bad; exit 1 }
    }
' "$source/README.md" "$source/examples/00_forward.c" >&2

echo "== the installed tool"
"$prefix/bin/clmoe" --version

echo "== the ABI's name"
version=$(pkg-config --modversion clmoe)
[ -e "$libdir/libclmoe.so.${version%.*}" ] || {
    ls "$libdir" >&2
    echo "no libclmoe.so.${version%.*}: before 1.0 the ABI changes with the minor version" >&2
    exit 1
}

echo "== exported names"
for library in "$libdir/libclmoe.so" "$libdir/libclmoe.a"; do
    dynamic=
    case $library in *.so) dynamic=-D ;; esac
    if nm $dynamic --defined-only --extern-only "$library" | awk 'NF == 3 {print $3}' |
        grep -v -e '^clmoe_' -e '^_fini$' -e '^_init$' -e '^__asan' -e '^__odr_asan' -e '^__ubsan'; then
        echo "$library exports the names above, which are not clmoe_*" >&2
        exit 1
    fi
done

if command -v c++ >/dev/null; then
    echo "== the header in C++, without casts"
    cat >"$tmp/header.cpp" <<END
#include <clmoe/clmoe.h>
int main() {
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.type = CLMOE_BF16;
    desc.router.score = desc.num_experts > 1 ? CLMOE_SCORE_SIGMOID : CLMOE_SCORE_SOFTMAX;
    clmoe_schedule schedule = {};
    schedule.shape = CLMOE_SCHEDULE_LINEAR;
    static_assert(sizeof schedule.shape == 4 && sizeof desc.router.policy == 4, "numbers have four bytes");
    clmoe_status status = clmoe_layer_create(nullptr, &desc, nullptr);
    return status == CLMOE_SUCCESS || clmoe_version() == nullptr;
}
END
    # shellcheck disable=SC2046
    c++ -std=c++11 -Wall -Wextra -Werror $(pkg-config --cflags clmoe) -fsyntax-only "$tmp/header.cpp"
fi
