#!/usr/bin/env bash
# segment_beats on random input of every kind under AddressSanitizer and UndefinedBehaviorSanitizer (reads out of bounds, overflows), and
# all kernels, a thread of the machine for every CUDA thread, also under ThreadSanitizer (races). Some minutes; stops at the first fault.
set -euo pipefail
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags=(-std=c++17 -g -ffp-contract=off -pthread -Wno-psabi -Wno-unknown-pragmas -DFUZZ beats_on_host.cpp ../csrc/beats.cpp)
# without ifunc: sanitizers are not ready yet when it chooses a clone
g++ -O1 -fsanitize=address,undefined -fno-sanitize-recover=all "-DEVERY_CPU=" "${flags[@]}" -o "$folder/address"
"$folder/address" "${1:-2000}" cpu
"$folder/address" 40 both
g++ -O1 -fsanitize=thread "-DEVERY_CPU=" "${flags[@]}" -o "$folder/thread"
export TSAN_OPTIONS=halt_on_error=1
"$folder/thread" 16 both
for source in similarity_on_host.cpp sigmoid_on_host.cpp; do
    flags=(-std=c++17 -g -O1 -pthread -Wno-unknown-pragmas -DFUZZ "$source")
    g++ -fsanitize=address,undefined -fno-sanitize-recover=all "${flags[@]}" -o "$folder/address"
    "$folder/address"
    g++ -fsanitize=thread "${flags[@]}" -o "$folder/thread"
    "$folder/thread"
done
