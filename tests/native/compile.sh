#!/bin/sh
# Compiles the kernels of one OpenCL program as native code, with sanitizers and coverage, and a
# function run_KERNEL(void **arguments) for each. CLMOE_CLANG is the compiler.
# usage: compile.sh SOURCE.cl LIBRARY.so DEVICE.so OPTION...
set -eu
unset LD_PRELOAD # the sanitizer's, of the program that runs the kernels
source=$1
library=$2
device=$3
shift 3
here=$(dirname "$0")
# shellcheck disable=SC3013 # every sh of today has -nt
if [ "$library" -nt "$source" ] && [ "$library" -nt "$here/opencl.h" ] && [ "$library" -nt "$0" ]; then
    exit 0
fi
kernel() {
    # Kernels add an offset of 0 to a buffer that is not given: undefined in C, not on a device.
    "$CLMOE_CLANG" -x cl -cl-std=CL1.2 -D__OPENCL_VERSION__=120 -Wno-everything \
        -include "$here/opencl.h" "$@"
}
options=$(printf '%s\n' "$@" | grep -v '^-cl-std' || true)
# shellcheck disable=SC2086 # one word per option
{
    cat "$source"
    kernel -E -P $options "$source" | tr '\n' ' ' | awk '
    {
        while ((at = index($0, "__kernel")) > 0) {
            $0 = substr($0, at + 8)
            at = index($0, " void ")
            $0 = substr($0, at + 6)
            name = substr($0, 1, index($0, "(") - 1)
            parameters = substr($0, index($0, "(") + 1, index($0, ")") - index($0, "(") - 1)
            count = split(parameters, parameter, ",")
            printf "void run_%s(__private void *__private *arguments) {\n    %s(", name, name
            for (i = 1; i <= count; i++) {
                sub(/[A-Za-z_0-9]+ *$/, "", parameter[i])
                printf "%s*(%s __private *)arguments[%d]", (i > 1 ? ", " : ""), parameter[i], i - 1
            }
            print ");\n}"
        }
    }'
} >"$library.cl"
# shellcheck disable=SC2086
kernel $options -O0 -gline-tables-only -fPIC -shared -fsanitize=address,undefined -fno-sanitize=pointer-overflow \
    -fno-sanitize-recover=all -shared-libasan "-fprofile-instr-generate=$library.%p.profraw" -fcoverage-mapping \
    "$library.cl" -x none "$device" -lm -o "$library"
