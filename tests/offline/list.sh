#!/bin/sh
# Writes the source of every program of the library, with its options, to DIRECTORY/gpu, DIRECTORY/cpu
# and DIRECTORY/nvidia, as a GPU, a CPU and, of its own kernels, a GPU of NVIDIA are given them. What
# list_kernels does not build is taken from the test programs, whatever they say of a device that runs
# nothing.
# usage: list.sh LIST_KERNELS DIRECTORY CL_DIRECTORY TEST_PROGRAM...
set -eu
list_kernels=$1
directory=$2
kernels=$3
shift 3
for type in gpu cpu; do
    rm -rf "${directory:?}/$type"
    mkdir -p "$directory/$type"
    CLMOE_NATIVE_TYPE=$type CLMOE_NATIVE_SOURCES=$directory/$type "$list_kernels"
done
# Kernels in NVIDIA's assembly are for its devices alone.
mkdir -p "$directory/nvidia"
rm -f "$directory/nvidia/"*
CLMOE_NATIVE_NVIDIA=9.0 CLMOE_NATIVE_TYPE=gpu CLMOE_NATIVE_SOURCES=$directory/nvidia "$list_kernels"
find "$directory/nvidia" -name '*.cl' ! -name 'nv_*' -exec rm {} +
missing() { # kernels in no program
    find "$kernels" -name '*.cl' | sort | while read -r file; do
        name=$(basename "$file" .cl)
        ls "$directory"/*/"$name"-*.cl >/dev/null 2>&1 || echo "$name"
    done
}
for program in "$@"; do
    [ -n "$(missing)" ] || break
    for type in gpu cpu; do
        CLMOE_NATIVE_TYPE=$type CLMOE_NATIVE_SOURCES=$directory/$type timeout 60 "$program" \
            >/dev/null 2>&1 || true
    done
done
for type in gpu cpu nvidia; do
    echo "$type: $(find "$directory/$type" -name '*.cl' | wc -l) programs"
done
[ -z "$(missing)" ] || { echo "in no program: $(missing)" && exit 1; }
