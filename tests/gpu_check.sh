#!/usr/bin/env bash
# Everything a GPU has to show: the GPU tests, the speed of the operators and of training, 300 updates of every method at its published
# size. One part alone, where time is short: tests/gpu_check.sh tests (or speed, or paper).
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
for part in ${@:-tests speed paper}; do
    case $part in
        tests) python3 -m pytest -q -rs tests/test_gpu.py ;;
        speed)
            python3 tests/bench_beats.py
            python3 tests/bench_similarity.py
            python3 tests/bench_train.py ;;
        paper) python3 tests/paper_size.py --batch-size 64 --records 2000 --epochs 12 ;;
        *) echo "unknown part $part: tests, speed or paper" >&2; exit 2 ;;
    esac
done
