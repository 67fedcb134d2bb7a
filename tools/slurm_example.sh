#!/usr/bin/env bash
# One process per GPU:
#
#   sbatch --nodes=2 tools/slurm_example.sh --config=tabletop --workdir=/shared/runs/mine --set=mesh.data=0
#
# Change the resources to those of your cluster; --workdir must be on storage that all nodes share. Before its time
# limit the job gets SIGTERM, saves a checkpoint and ends; the same command goes on from there.
#SBATCH --job-name=worldenv
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?this is a script for sbatch}"
if [ $# -eq 0 ]; then
  echo "error: no arguments for experiments/post_train.py" >&2
  exit 2
fi
# JAX reads coordinator, number of processes, own number and own GPU from SLURM's variables, one GPU per process:
# --ntasks-per-node must equal --gpus-per-node.
exec srun --kill-on-bad-exit=1 .venv/bin/python experiments/post_train.py --distributed "$@"
