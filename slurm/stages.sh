#!/bin/bash
# Submits a recipe's stages as a chain of jobs, each of which starts when the one before has finished its stage. All
# train one run, so a stage goes on from the last checkpoint of the stage before. A stage that fails stops the chain.
#
#   bash slurm/stages.sh RECIPE STAGE [STAGE ...] [-- SBATCH-OPTION ...]
#
# for instance: bash slurm/stages.sh joyai_48b_a3b warmup stable decay long -- --nodes=16
# A stage may have nodes and a layout of its own: submit it by hand, with run.last_stage=STAGE and --dependency.
set -euo pipefail
if (($# < 2)); then
    echo "usage: bash slurm/stages.sh RECIPE STAGE [STAGE ...] [-- SBATCH-OPTION ...]" >&2
    exit 2
fi
recipe=$1
shift
stages=()
while (($#)) && [[ $1 != -- ]]; do
    stages+=("$1")
    shift
done
(($# == 0)) || shift # the --

previous=
for stage in "${stages[@]}"; do
    after=()
    if [[ -n $previous ]]; then
        after=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    fi
    previous=$(sbatch --parsable "--job-name=joy-$stage" ${after[@]+"${after[@]}"} "$@" \
        "${JOY_TEMPLATE:-slurm/pretrain.sbatch}" "$recipe" "run.last_stage=$stage")
    echo "$stage: job $previous"
done
