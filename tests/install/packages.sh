#!/bin/sh
# Configures without one package each: left out with a word, or an error that says what to install.
# Usage: packages.sh SOURCE CC
set -eu
source=$1 cc=$2
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
for package in jansson OpenCL; do
    file=$(pkg-config --variable=pcfiledir $package)/$package.pc
    mkdir -p "$tmp/$package-only" "$tmp/both"
    cp "$file" "$tmp/$package-only/"
    cp "$file" "$tmp/both/"
done

# expect WORDS RESULT PC-FOLDER OPTION...: the configuration's output has WORDS; it fails if RESULT is not 0.
expect() {
    words=$1 want=$2 pc=$3 result=0
    shift 3
    echo "== $words"
    rm -f "$tmp/build/CMakeCache.txt"
    PKG_CONFIG_LIBDIR=$tmp/$pc PKG_CONFIG_PATH='' cmake -S "$source" -B "$tmp/build" \
        "-DCMAKE_C_COMPILER=$cc" "$@" >"$tmp/log" 2>&1 || result=1
    if [ $result != "$want" ] || ! tr -s ' \n' ' ' <"$tmp/log" | grep -q -e "$words"; then
        cat "$tmp/log" >&2
        exit 1
    fi
}

expect 'no cmocka: the tests are left out.*libcmocka-dev' 0 both -DCLMOE_WITH_CLBLAST=OFF
expect 'CLMOE_BUILD_TESTS is ON, but cmocka is missing: install libcmocka-dev' 1 both -DCLMOE_BUILD_TESTS=ON
expect 'no CLBlast: the engine clblast is left out.*libclblast-dev' 0 both \
    -DCMAKE_DISABLE_FIND_PACKAGE_CLBlast=TRUE
expect 'CLMOE_WITH_CLBLAST is ON, but CLBlast is missing: install libclblast-dev' 1 both \
    -DCMAKE_DISABLE_FIND_PACKAGE_CLBlast=TRUE -DCLMOE_WITH_CLBLAST=ON
expect 'jansson.* is missing: install libjansson-dev' 1 OpenCL-only
expect 'OpenCL.* is missing: install opencl-headers' 1 both -DCMAKE_DISABLE_FIND_PACKAGE_OpenCL=TRUE
expect 'pkg-config is missing: install' 1 both -DCMAKE_DISABLE_FIND_PACKAGE_PkgConfig=TRUE
expect 'Generating done' 0 both -DBUILD_SHARED_LIBS=ON
cmake --build "$tmp/build" --target help >"$tmp/targets"
grep -q 'clmoe$' "$tmp/targets"
if grep clmoe_static "$tmp/targets" >&2; then exit 1; fi
