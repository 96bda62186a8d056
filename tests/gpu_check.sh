#!/usr/bin/env bash
# Everything a GPU has to show, in one command: the GPU tests, the speed of the operators, then that of training at the small and the
# paper sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
python3 -m pytest -q -rs tests/test_gpu.py
python3 tests/bench_beats.py
python3 tests/bench_similarity.py
python3 tests/bench_train.py
python3 tests/paper_size.py --batch-size 64 --records 2000 --epochs 12  # 300 updates of every method at its published size
