#!/bin/bash
# Submit an init job, and a training job that starts when the init job's output is there and verified.
#
#   launch/slurm/init_then_train.sh launch/slurm/srun_per_gpu.sbatch train.sbatch --config my.yaml
#
# train.sbatch is yours: it trains `loraga_init` on `residual_base`, both in the output directory, whose README.md has the
# lines. What follows goes to the init job. Exit code 0 of it means verified; after any other the training job is
# cancelled.
set -euo pipefail

if (( $# < 3 )); then
    sed -n '4p' "$0" >&2
    exit 2
fi
init=$1
train=$2
shift 2
init_id=$(sbatch --parsable "$init" "$@")
init_id=${init_id%%;*} # a federation adds ;cluster
train_id=$(sbatch --parsable --dependency="afterok:$init_id" --kill-on-invalid-dep=yes "$train")
echo "init: job $init_id, training: job ${train_id%%;*}"
