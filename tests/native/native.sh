#!/bin/sh
# Runs test programs with every kernel as native code under AddressSanitizer and
# UndefinedBehaviorSanitizer, then lists the lines of cl/ that none of them ran. A kernel in none of
# them is run by its own test: cl/dispatch/plan.cl by test_plan beside the first program.
# usage: native.sh BINARY_DIR SOURCE_DIR PROGRAM[:TEST[:gpu]]...
set -eu
binary=$1
source=$2
shift 2
. "$source/tests/clangs.sh"
runtime=
for CLMOE_CLANG in $(clangs); do
    runtime=$("$CLMOE_CLANG" -print-file-name="libclang_rt.asan-$(uname -m).so")
    [ ! -e "$runtime" ] || break
done
if ! [ -e "$runtime" ]; then
    echo "skipped: no clang with an AddressSanitizer library"
    exit 77
fi
version=$("$CLMOE_CLANG" -dumpversion | cut -d. -f1)
tool() { # of the compiler's own version
    command -v "$1-$version" || "$CLMOE_CLANG" -print-prog-name="$1"
}
LLVM_PROFDATA=$(tool llvm-profdata)
LLVM_COV=$(tool llvm-cov)
CLMOE_NATIVE_RUN=$binary/kernels
CLMOE_NATIVE_COMPILE=$source/tests/native/compile.sh
export CLMOE_CLANG CLMOE_NATIVE_RUN CLMOE_NATIVE_COMPILE LLVM_PROFDATA LLVM_COV
rm -rf "$CLMOE_NATIVE_RUN"
mkdir -p "$CLMOE_NATIVE_RUN"
run() { # PROGRAM TEST; groups are those of test_kernels, so that programs are compiled once
    OCL_ICD_VENDORS=$binary/libnative_device.so CLMOE_TEST_DEVICE=0 CLMOE_TEST_MOST_GROUP=16 \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
        LD_PRELOAD="$runtime:$binary/libnative_clblast.so" CLMOE_TEST_FILTER="$2" "$1"
}
for program in "$@"; do
    case $program in
    *:*:gpu)
        test=${program%:gpu}
        CLMOE_NATIVE_TYPE=gpu run "${test%:*}" "${test##*:}"
        ;;
    *:*) run "${program%:*}" "${program##*:}" ;;
    *) run "$program" "*" ;;
    esac
done
find "$source/cl" -name '*.cl' | sort | while read -r kernel; do
    name=$(basename "$kernel" .cl)
    own=$(dirname "$1")/test_$name
    if [ -x "$own" ] && ! ls "$CLMOE_NATIVE_RUN/$name"-*.so >/dev/null 2>&1; then
        run "$own" "*"
    fi
done
if ! command -v "$LLVM_PROFDATA" >/dev/null || ! command -v "$LLVM_COV" >/dev/null; then
    echo "no llvm-profdata and llvm-cov: the lines are not counted"
    exit 0
fi
"$source/tests/native/coverage.sh" "$CLMOE_NATIVE_RUN" "$source/cl"
