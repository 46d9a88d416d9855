#!/bin/sh
# Compiles the programs that list.sh wrote for a device that is not here; exit 77: no compiler.
# usage: compile.sh spirv|sm_80|gfx90a|...|intel CLANG DIRECTORY all|one, of each file of cl/
set -eu
target=$1
clang=$2
directory=$3
which=$4
output=$directory/$target.$which
libclc=/usr/lib/clc

skip() {
    echo "skipped: $*"
    exit 77
}

front_end() { # warnings are errors
    "$clang" -x cl -D__OPENCL_VERSION__=120 -Wall -Wno-unused-function -Wno-linker-warnings -Werror \
        "$@"
}
header="-Xclang -finclude-default-header -Xclang -cl-ext=+cl_khr_fp16"
link="-O2 -Xclang -mlink-builtin-bitcode -Xclang"

# LLVM's SPIR-V translator wants code that was not optimised.
# shellcheck disable=SC2086 # the words of $header
spirv() {
    front_end $header -O0 -target spir64-unknown-unknown -emit-llvm -c -o "$output.bc" "$@" || return 1
    [ -n "$translate" ] || return 0
    "$translate" --spirv-max-version=1.0 "$output.bc" -o "$output.spv" || return 1
    [ -n "$validate" ] || return 0
    "$validate" --target-env opencl1.2 "$output.spv"
}

# To PTX; to machine code where the built-in functions and NVIDIA's assembler are there.
# shellcheck disable=SC2086
nvidia() {
    library=$libclc/nvptx64--nvidiacl.bc
    target_words="-target nvptx64-nvidia-nvcl -Xclang -target-cpu -Xclang $target -S"
    if [ -n "$assemble" ] && [ -e "$library" ]; then
        front_end $target_words $link "$library" -o "$output.ptx" "$@" || return 1
        "$assemble" -arch="$target" "$output.ptx" -o "$output.cubin"
    else
        front_end $header $target_words -o "$output.ptx" "$@"
    fi
}

# Nothing may go to memory for lack of vector registers.
# shellcheck disable=SC2086
amd() {
    front_end -target amdgcn-amd-amdhsa -mcpu="$target" -nogpulib $link "$libclc/amdgcn--amdhsa.bc" \
        -S -o "$output.s" "$@" || return 1
    ! grep -E '\.(vgpr_spill_count|private_segment_fixed_size): *[1-9]' "$output.s"
}

intel() {
    source=$1
    shift
    ocloc compile -q -file "$source" -device dg2 -options "$*" -out_dir "$output" >"$output.log" 2>&1 ||
        { cat "$output.log" && return 1; }
}

compile() { # SOURCE OPTION...
    case $target in
    spirv) spirv "$@" ;;
    sm_*) nvidia "$@" ;;
    gfx*) amd "$@" ;;
    intel) intel "$@" ;;
    esac
}

translate=$(command -v "llvm-spirv-$("$clang" -dumpversion | cut -d. -f1)" || true)
validate=$(command -v spirv-val || true)
assemble=$(command -v ptxas || true)
case $target in
gfx*) [ -e "$libclc/amdgcn--amdhsa.bc" ] || skip "no libclc for AMD" ;;
intel) command -v ocloc >/dev/null || skip "no ocloc" ;;
esac
echo '__kernel void probe(__global float *p) { p[0] = 0.0f; }' >"$output.cl"
compile "$output.cl" -cl-std=CL1.2 >"$output.log" 2>&1 || skip "no compiler for $target: $(head -n 1 "$output.log")"

count=0
failed=0
last=
for source in "$directory"/gpu/*.cl "$directory"/nvidia/*.cl "$directory"/cpu/*.cl; do
    # What a CPU is given matters only where a CPU may read it.
    # NVIDIA's assembly is for its devices alone.
    case $target:$source in
    sm_*:*/nvidia/* | *:*/gpu/*) ;;
    *:*/nvidia/*) continue ;;
    spirv:*) ;;
    *) continue ;;
    esac
    kernel=$(basename "${source%-*}")
    [ "$which" = all ] || [ "$kernel" != "$last" ] || continue
    last=$kernel
    options=$(sed -n '1s,^// options: ,,p' "$source")
    count=$((count + 1))
    # shellcheck disable=SC2086 # one word per option
    compile "$source" $options || {
        echo "$(basename "$source") with $options: failed for $target"
        failed=$((failed + 1))
    }
done
echo "$target: $count programs, $failed failed"
[ "$failed" = 0 ] && [ "$count" -gt 0 ]
