#!/bin/sh
# What scripts/install-deps takes from distributions that lack one thing or another, by stand-ins of
# apt-get, apt-cache and dpkg-query; and what tests say that lack their tool. usage: distributions.sh SOURCE
set -eu
source=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$source/scripts/packages"

fail() {
    echo "$*" >&2
    exit 1
}

mkdir "$tmp/bin"
cat >"$tmp/bin/apt-get" <<'END'
#!/bin/sh
for word; do
    case $word in -* | install) continue ;; update) exit 0 ;; esac
    grep -qx "$word" "$DISTRIBUTION" || { echo "E: Unable to locate package $word" && exit 100; }
    echo "$word" >>"$INSTALLED"
done
END
cat >"$tmp/bin/apt-cache" <<'END'
#!/bin/sh
grep -qx "$2" "$DISTRIBUTION"
END
cat >"$tmp/bin/dpkg-query" <<'END'
#!/bin/sh
for word; do :; done
! grep -qx "$word" "$INSTALLED" || echo installed
END
printf '#!/bin/sh\nexec "$@"\n' >"$tmp/bin/sudo"
chmod +x "$tmp"/bin/*
export DISTRIBUTION="$tmp/distribution" INSTALLED="$tmp/installed"

# shellcheck disable=SC2086 # one word per package
distribution() { # PACKAGE...: one that has these beside what is required
    printf '%s\n' $build_packages $test_packages "$@" >"$DISTRIBUTION"
    : >"$INSTALLED"
}
# shellcheck disable=SC2086
install() {
    PATH="$tmp/bin:$PATH" "$source/scripts/install-deps" $build_packages $test_packages \
        --optional $test_extras >"$tmp/out" 2>&1
}
expect() { # PACKAGE...: these, and no other clang, are installed
    for package; do grep -qx "$package" "$INSTALLED" || fail "no $package in: $(xargs <"$INSTALLED")"; done
    grep -E '^(clang|libclc)-' "$INSTALLED" >"$tmp/compilers" || true
    while read -r package; do
        case " $* " in *" $package "*) ;; *) fail "$package was not asked for" ;; esac
    done <"$tmp/compilers"
}

distribution libopenblas-dev oclgrind spirv-tools llvm-15 llvm-spirv-15 clang-15 clang-19 llvm-19 \
    libclang-rt-19-dev libclc-15 libclc-19
install || fail "like Debian 12: $(cat "$tmp/out")"
expect oclgrind clang-15 llvm-spirv-15 clang-19 libclang-rt-19-dev libclc-19

distribution libopenblas-dev spirv-tools clang-22 llvm-22 libclc-22 clang-19 llvm-19 llvm-spirv-19 \
    libclang-rt-19-dev libclc-19 clang-17 libclc-17
install || fail "like Debian 13: $(cat "$tmp/out")"
expect clang-19 llvm-spirv-19 libclang-rt-19-dev libclc-19
grep -q "no oclgrind" "$tmp/out" || fail "not a word on Oclgrind: $(cat "$tmp/out")"

echo "clang-17 libclc-17" | tr ' ' '\n' >>"$INSTALLED"
sed -i '/libclc-19/d' "$INSTALLED"
install || fail "libclc-17 is there: $(cat "$tmp/out")"
expect clang-17 clang-19 libclc-17

distribution
install || fail "one without compilers: $(cat "$tmp/out")"
expect

sed -i /cmake/d "$DISTRIBUTION"
: >"$INSTALLED"
! install || fail "without cmake, and no error"
grep -q "locate package cmake" "$tmp/out" || fail "not a word on cmake: $(cat "$tmp/out")"

# Tests without their tool.
mkdir "$tmp/plain"
for tool in sh sed cat cut head dirname basename find uname grep; do
    ln -s "$(command -v $tool)" "$tmp/plain/"
done
skips() { # REASON COMMAND...
    reason=$1
    shift
    status=0
    PATH=$tmp/plain "$@" >"$tmp/out" 2>&1 || status=$?
    [ $status = 77 ] || fail "$* ended with $status: $(cat "$tmp/out")"
    grep -q "^skipped: .*$reason" "$tmp/out" || fail "$* does not say why: $(cat "$tmp/out")"
}
skips "Oclgrind" "$source/tests/oclgrind.sh" "$tmp/log" true
skips "python3" "$source/tests/bench/peers.sh" clmoe-bench
skips "clang" "$source/tests/native/native.sh" "$tmp" "$source"
skips "compiler for spirv" "$source/tests/offline/compile.sh" spirv "$tmp" all
skips "compiler for intel" "$source/tests/offline/compile.sh" intel "$tmp" all
