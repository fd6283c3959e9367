#!/usr/bin/env bash
# The papers' STL10 experiment as closely as this code can: their views by PIL, fp32, two BatchNorm
# batches of 128 for the authors' two GPUs, and a probe whose BatchNorm drifts.
#
#     bash misc/published.sh results/published                            # HCL, beta = 1
#     bash misc/published.sh results/simclr --estimator standard          # another column
#
# Further arguments are flags of main.py, but --epochs. The same command continues a run that was stopped.
set -eu
results=$1
shift
home=$(dirname "$0")/..
python "$home/main.py" --micro_batch 128 --precision fp32 --compile False --augment pil \
    --results_dir "$results" "$@"
python "$home/linear.py" --model_path "$results/model_400.pth" --bn train --precision fp32
