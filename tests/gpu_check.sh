#!/usr/bin/env bash
# What a GPU has to show, in parts of at most four minutes: tests/gpu_check.sh tests (or operators, train, paper).
# tests: equality with the CPU, resuming. operators, train: their speed. paper: the published recipes, read from disk.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
for part in ${@:-tests operators train paper}; do
    case $part in
        tests) python3 -m pytest -q -rs -n 8 --dist worksteal tests/test_gpu.py ;;
        operators)
            python3 tests/bench_beats.py --gpu
            python3 tests/bench_similarity.py --gpu ;;
        train)
            python3 tests/bench_train.py --size paper
            python3 tests/bench_train.py --size paper --method merl fgclep --compile ;;
        paper) python3 tests/paper_size.py --batch-size 64 --records 2000 --epochs 12 ;;
        *) echo "unknown part $part: tests, operators, train or paper" >&2; exit 2 ;;
    esac
done
