#!/usr/bin/env bash
# A training run on the GPUs of several SLURM nodes; requeued when it is preempted or out of time.
#
#   launch/slurm.sh --nodes=4 --gpus=8 [--time=24:00:00] [--partition=P] [--account=A]
#       [--log=FILE] [--restarts=100] [--dry_run] -- python -m ppflow_jax.main --workdir=DIR ...
#
# --gpus is that of one node. DIR must be on storage that every node sees. `scancel --signal=TERM
# JOB` saves and requeues; `scancel JOB` ends. Preemption gives the GraceTime of the partition to
# save in: with none, the run goes on from its last checkpoint. Flags may come from PPFLOW_NODES, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"

parse "nodes gpus time partition account log restarts" "$@"
need nodes gpus
need_command
restarts=${restarts:-100}
numbers nodes gpus restarts
need_tool sbatch
options=(--nodes="$nodes" --gpus-per-node="$gpus")
options+=(--export="ALL,PPFLOW_GPUS=$gpus,PPFLOW_RESTARTS=$restarts")
for flag in time partition account; do
  if [[ -n ${!flag} ]]; then options+=("--$flag=${!flag}"); fi
done
if [[ -n $log ]]; then options+=(--output="$log"); fi
run sbatch "${options[@]}" "$(dirname "$0")/slurm.sbatch" "${command[@]}"
