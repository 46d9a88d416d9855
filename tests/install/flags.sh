#!/bin/sh
# Builds the library with the flags of Ubuntu's and of Fedora's packages, LTO and -g among them, and
# links an application with the same flags; builds it static or shared alone.
# Usage: flags.sh SOURCE CC
set -eu
source=$1 cc=$2
here=$source/tests/install
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

# As redhat-rpm-config has them: programs are position-independent and bound at once.
cat >"$tmp/cc1" <<'END'
*cc1_options:
+ %{!r:%{!fpie:%{!fPIE:%{!fpic:%{!fPIC:%{!fno-pic:-fPIE}}}}}}
END
cat >"$tmp/ld" <<'END'
*self_spec:
+ %{!static:%{!shared:%{!r:-pie}}}

*link:
+ -z now
END
ubuntu="-g -O2 -flto=auto -ffat-lto-objects -fstack-protector-strong -Wformat -Werror=format-security"
ubuntu_ld="-Wl,-Bsymbolic-functions -flto=auto -ffat-lto-objects -Wl,-z,relro"
fedora="-O2 -flto=auto -ffat-lto-objects -fexceptions -g -pipe -Wall -Wp,-D_GLIBCXX_ASSERTIONS \
-specs=$tmp/cc1 -fstack-protector-strong -fasynchronous-unwind-tables"
fedora_ld="-Wl,-z,relro -Wl,--as-needed -Wl,-z,now -specs=$tmp/ld"
for flag in -D_FORTIFY_SOURCE=2 -grecord-gcc-switches -fstack-clash-protection -fcf-protection; do
    if echo 'int main(void) { return 0; }' | $cc -Werror -O2 $flag -x c - -o "$tmp/a.out" 2>/dev/null; then
        fedora="$fedora $flag"
    fi
done
if ! echo 'int main(void) { return 0; }' | $cc -Werror -flto=auto -ffat-lto-objects -specs="$tmp/cc1" \
    -x c - -o "$tmp/a.out" 2>/dev/null; then
    echo "$cc does not know these flags: left out"
    exit 77
fi

# build NAME CFLAGS LDFLAGS OPTION...: builds and installs the library alone under $tmp/NAME.
build() {
    name=$1 cflags=$2 ldflags=$3
    shift 3
    cmake -S "$source" -B "$tmp/$name.build" "-DCMAKE_C_COMPILER=$cc" "-DCMAKE_C_FLAGS=$cflags" \
        -DCMAKE_BUILD_TYPE=None "-DCMAKE_EXE_LINKER_FLAGS=$ldflags" "-DCMAKE_SHARED_LINKER_FLAGS=$ldflags" \
        "-DCMAKE_INSTALL_PREFIX=$tmp/$name" -DCMAKE_INSTALL_LIBDIR=lib -DCLMOE_BUILD_TESTS=OFF \
        -DCLMOE_BUILD_TOOL=OFF -DCLMOE_BUILD_BENCH=OFF -DCLMOE_BUILD_EXAMPLES=OFF "$@" >"$tmp/log" ||
        { cat "$tmp/log" >&2; exit 1; }
    cmake --build "$tmp/$name.build" --parallel 2 >"$tmp/log" || { cat "$tmp/log" >&2; exit 1; }
    DESTDIR=$tmp/root cmake --install "$tmp/$name.build" >"$tmp/log"
    mv "$tmp/root$tmp/$name" "$tmp/$name"
}

# names LIBRARY [-D]: fails if it exports a name that is not the library's.
names() {
    # shellcheck disable=SC2086 # no flag, or one
    if nm ${2-} --defined-only --extern-only "$1" | awk 'NF == 3 {print $3}' |
        grep -v -e '^clmoe_' -e '^_fini$' -e '^_init$'; then
        echo "$1 exports the names above, which are not clmoe_*" >&2
        exit 1
    fi
}

# links NAME CFLAGS LDFLAGS TARGET: an application by pkg-config, and the examples' TARGET by find_package's
# clmoe::clmoe.
links() {
    flags=$(PKG_CONFIG_PATH=$tmp/$1/lib/pkgconfig pkg-config --cflags --libs clmoe)
    eval "$cc $2 '$source/examples/00_forward.c' $flags $3 -o '$tmp/$1.forward'" # spaces are escaped
    LD_LIBRARY_PATH="$tmp/$1/lib" "$tmp/$1.forward" >/dev/null
    cmake -S "$source/examples" -B "$tmp/$1.examples" "-DCMAKE_PREFIX_PATH=$tmp/$1" "-DCMAKE_C_COMPILER=$cc" \
        "-DCMAKE_C_FLAGS=$2" "-DCMAKE_EXE_LINKER_FLAGS=$3" >"$tmp/log"
    cmake --build "$tmp/$1.examples" --target "$4" >"$tmp/log" || { cat "$tmp/log" >&2; exit 1; }
    "$tmp/$1.examples/00_forward" >/dev/null
}

echo "== Ubuntu's flags, static alone"
build "a b" "$ubuntu -O0" "$ubuntu_ld" -DBUILD_SHARED_LIBS=OFF # -O0: it compiles sooner
[ ! -e "$tmp/a b/lib/libclmoe.so" ]
names "$tmp/a b/lib/libclmoe.a"
links "a b" "$ubuntu" "$ubuntu_ld" 00_forward # each of them optimizes the whole library again

echo "== Fedora's flags, both"
build both "$fedora" "$fedora_ld"
names "$tmp/both/lib/libclmoe.a"
names "$tmp/both/lib/libclmoe.so" -D
links both "$fedora" "$fedora_ld" all
# shellcheck disable=SC2046,SC2086 # flags are words
PKG_CONFIG_PATH=$tmp/both/lib/pkgconfig $cc $fedora "$source/examples/00_forward.c" \
    $(PKG_CONFIG_PATH=$tmp/both/lib/pkgconfig pkg-config --cflags --libs --static clmoe |
        sed "s|-lclmoe|$tmp/both/lib/libclmoe.a|") $fedora_ld -o "$tmp/static"
"$tmp/static" >/dev/null

echo "== documents and license"
for file in LICENSE README.md docs/balancing.md; do
    [ -s "$tmp/both/share/doc/clmoe/$file" ] || {
        echo "$file is not installed" >&2
        exit 1
    }
done
