#!/bin/bash
# Submit the init job, and a training job that starts when the init job's output is there and verified.
#
#   launch/slurm/init_then_train.sh train.sbatch --config my.yaml --output.dir runs/my-start
#
# train.sbatch is yours; it trains runs/my-start/loraga_init on runs/my-start/residual_base, as the README.md there says.
# Exit code 0 of the init job means verified; after any other, SLURM cancels the training job. Options of sbatch for the
# init job go into its own variables, such as SBATCH_ACCOUNT and SBATCH_PARTITION, or into a copy of the file.
set -euo pipefail

if (( $# < 2 )); then
    sed -n '4p' "$0" >&2
    exit 2
fi
train=$1
shift
init_id=$(sbatch --parsable launch/slurm/srun_per_gpu.sbatch "$@")
train_id=$(sbatch --parsable --dependency="afterok:${init_id%%;*}" --kill-on-invalid-dep=yes "$train")
echo "init: job ${init_id%%;*}, training: job ${train_id%%;*}"
