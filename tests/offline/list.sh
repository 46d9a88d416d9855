#!/bin/sh
# Writes the source of every program of the library, with its options, to DIRECTORY/gpu and
# DIRECTORY/cpu, as a GPU and a CPU are given them. What list_kernels does not build is taken from the
# test programs, whatever they say of a device that runs nothing.
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
missing() { # kernels in no program; those in one vendor's assembly are not for any device
    for file in "$kernels"/*.cl; do
        name=$(basename "$file" .cl)
        case $name in gemm_nv* | nv_*) continue ;; esac
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
for type in gpu cpu; do
    echo "$type: $(find "$directory/$type" -name '*.cl' | wc -l) programs"
done
[ -z "$(missing)" ] || { echo "in no program: $(missing)" && exit 1; }
