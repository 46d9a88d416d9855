#!/bin/sh
# Compiles the programs that list.sh wrote for a device that is not here; exit 77: no compiler.
# usage: compile.sh spirv|sm_80|sm_90a|gfx90a|...|intel DIRECTORY all|one EDIT_PTX; one: of each file of cl/
set -eu
target=$1
directory=$2
which=$3
edit_ptx=${4:-} # needed for sm_90a alone
# shellcheck source=tests/clangs.sh
. "$(dirname "$0")/../clangs.sh"
output=$directory/$target.$which
libclc=/usr/lib/clc # its files are named as the version has them

skip() {
    echo "skipped: $*"
    exit 77
}

front_end() { # warnings are errors
    "$compiler" -x cl -D__OPENCL_VERSION__=120 -Wall -Wno-unused-function -Wno-linker-warnings -Werror \
        "$@"
}
header="-Xclang -finclude-default-header -Xclang -cl-ext=+cl_khr_fp16"
link="-O2 -Xclang -mlink-builtin-bitcode -Xclang"

translator() { # of a clang's own version
    command -v "llvm-spirv-$("$1" -dumpversion | cut -d. -f1)" || true
}

# LLVM's SPIR-V translator wants code that was not optimised.
# shellcheck disable=SC2086 # the words of $header
spirv() {
    front_end $header -O0 -target spir64-unknown-unknown -emit-llvm -c -o "$output.bc" "$@" || return 1
    translate=$(translator "$compiler")
    [ -n "$translate" ] || return 0
    "$translate" --spirv-max-version=1.0 "$output.bc" -o "$output.spv" || return 1
    [ -n "$validate" ] || return 0
    "$validate" --target-env opencl1.2 "$output.spv"
}

# To PTX; what becomes machine code where the built-in functions and NVIDIA's assembler are there.
# libclc has no get_global_offset() for NVIDIA.
# shellcheck disable=SC2086
to_ptx() { # CPU SOURCE OPTION...
    target_words="-target nvptx64-nvidia-nvcl -Xclang -target-cpu -Xclang $1 -S"
    shift
    if [ -n "$assemble" ]; then
        front_end "-Dget_global_offset(d)=((size_t)0)" $target_words $link "$nvidia_library" -o "$output.ptx" "$@"
    else
        front_end $header $target_words -o "$output.ptx" "$@"
    fi
}

nvidia() {
    to_ptx "$target" "$@" || return 1
    [ -z "$assemble" ] || "$assemble" -arch="$target" "$output.ptx" -o "$output.cubin"
}

# What NVIDIA's OpenCL compiler writes and clang does not: the group's size, and a version that has
# wgmma.
# shellcheck disable=SC2004 # an expression, which dash reads only so
like_nvidia() { # SOURCE OPTION...
    group=$(front_end -E -P "$@" | sed -n 's/.*reqd_work_group_size(\(.*\), 1, 1).*/\1/p')
    sed 's/^\.version [67]\..*/.version 8.0/; s/^\.target sm_[0-9]*/.target sm_90/' "$output.ptx" |
        awk -v group="$(($group))" '
            /\.reqntid/ { has = 1 }
            /\.entry/ { entry = 1; has = 0 }
            entry && /^{/ { if (!has) printf ".reqntid %d, 1, 1\n", group; entry = 0 }
            { print }'
}

# Not to be seen in what the assembler says: registers that go to memory, wgmma one after the other.
most_spilled=128
assembled_well() {
    ! grep C75 "$output.words" || return 1
    sed -n 's/.* \([0-9]*\) bytes spill stores, \([0-9]*\) bytes spill loads.*/\1 \2/p' "$output.words" |
        awk -v most="$most_spilled" '
            $1 > most || $2 > most { print "spilled: " $0 " bytes"; failed = 1 } END { exit failed }'
}

# Clang knows no OpenCL for sm_90a either: PTX of an older target is edited as the library does it.
hopper() {
    to_ptx "$older" "$@" || return 1
    if grep -q '//@SM90A' "$output.ptx"; then
        like_nvidia "$@" >"$output.sm_90.ptx" || return 1
        "$edit_ptx" <"$output.sm_90.ptx" >"$output.ptx" || return 1
    fi
    [ -n "$assemble" ] || return 0
    "$assemble" -arch="$target" -v "$output.ptx" -o "$output.cubin" >"$output.words" 2>&1 || {
        cat "$output.words"
        return 1
    }
    assembled_well
}

# Nothing may go to memory for lack of vector registers.
# shellcheck disable=SC2086
amd() {
    front_end -target amdgcn-amd-amdhsa -mcpu="$target" -nogpulib $link "$amd_library" -S \
        -o "$output.s" "$@" || return 1
    ! grep -E '\.(vgpr_spill_count|private_segment_fixed_size): *[1-9]' "$output.s"
}

intel() {
    source=$1
    shift
    "$compiler" compile -q -file "$source" -device dg2 -options "$*" -out_dir "$output"
}

compile() { # SOURCE OPTION...
    case $target in
    spirv) spirv "$@" ;;
    sm_90a) hopper "$@" ;;
    sm_*) nvidia "$@" ;;
    gfx*) amd "$@" ;;
    intel) intel "$@" ;;
    esac
}

# In the order of preference.
compilers() {
    case $target in
    intel) command -v ocloc || true ;;
    spirv)
        for compiler in $(clangs); do [ -z "$(translator "$compiler")" ] || echo "$compiler"; done
        clangs
        ;;
    *) clangs ;;
    esac
}

# Sets `compiler` to the first that compiles something for the target.
find_compiler() {
    for compiler in $(compilers); do
        older=sm_86 # in clang from 14 on
        ! "$compiler" --print-supported-cpus -target nvptx64 2>&1 | grep -q 'sm_90$' || older=sm_90
        if compile "$output.cl" -cl-std=CL1.2 >"$output.log" 2>&1; then return; fi
    done
    skip "no compiler for $target: $(head -n 1 "$output.log")"
}

validate=$(command -v spirv-val || true)
nvidia_library=$libclc/nvptx64--nvidiacl.bc
assemble=$(command -v ptxas || command -v /usr/local/cuda/bin/ptxas || true)
[ -e "$nvidia_library" ] || assemble=
[ -z "$assemble" ] || "$assemble" --help | grep -q "'$target'" || assemble=
amd_library=$(find "$libclc" -name amdgcn--amdhsa.bc -o -name amdgcn-amd-amdhsa.bc 2>/dev/null || true)
case $target:$amd_library in gfx*:) skip "no libclc for AMD" ;; esac
# clang 21 fails on kernels with local memory for AMD, and on vectors of built-in functions for NVIDIA.
cat >"$output.cl" <<'END'
__kernel void probe(__global float *p) {
    __local float4 tile[4];
    tile[get_local_id(0)] = vload4(0, p);
    vstore4(tile[0], 0, p);
}
END
: >"$output.log"
find_compiler

count=0
failed=0
last=
for source in "$directory"/gpu/*.cl "$directory"/nvidia/*.cl "$directory"/cpu/*.cl; do
    # What a CPU is given matters only where a CPU may read it.
    # NVIDIA's assembly is for its devices alone, of the engine nv_wgmma for those of sm_90a.
    case $target:$source in
    sm_90a:*/nvidia/nv_wgmma_*) ;;
    sm_90a:* | sm_*:*/nvidia/nv_wgmma_*) continue ;;
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
echo "$target: $count programs, $failed failed, by $(basename "$compiler")"
[ "$failed" = 0 ] && [ "$count" -gt 0 ]
