#!/bin/bash
# 2 machines with 8 GPUs each under Slurm: one task per machine, which starts one process per GPU.
#
#     sbatch examples/accelerate/slurm_2x8_gpus.sh -m hpool_vit.toolkit.command train \
#         --preset hvt-s-1 --dataset_name imagenet-1k --output_dir /shared/outputs/hvt-s-1
#
# Submit it from the root of the repository, on a disk that both machines see, in an environment that has `accelerate`.
# If the job stops, submit it again: it resumes from the last checkpoint in --output_dir.
# Tested with a stand-in for Slurm and CPU processes only.

#SBATCH --job-name=hpool-vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail

first_machine=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# One port per job, because another job may run on the same machines.
port=$((20000 + SLURM_JOB_ID % 10000))

# The single quotes let each task fill in its own SLURM_NODEID.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file examples/accelerate/2x8_gpus.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port "$1" "${@:2}"
' "$first_machine" "$port" "$@"
