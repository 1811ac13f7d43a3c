#!/bin/bash
# One process a node under SLURM. Set nodes and devices to what the cluster has, then:
#
#   sbatch launch/slurm.sh --config configs/mnist.py --workdir /shared/runs/mnist
#
# The working directory must be on a file system that all nodes see.
#SBATCH --job-name=jaxdiff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# SLURM's own warning before the time limit: SIGTERM to the steps, five minutes ahead, so that the run saves
#SBATCH --signal=TERM@300
# after a node failure or preemption SLURM queues the job again; training goes on from its newest checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
export JAXDIFF_HEARTBEAT_SECONDS="${JAXDIFF_HEARTBEAT_SECONDS:-60}"
# without --kill-on-bad-exit=0 SLURM ends the whole step when one process dies, before the supervisors can restart it
exec srun --kill-on-bad-exit=0 jaxdiff train --restarts "${RESTARTS:-10}" --stall-timeout "${STALL:-1800}" "$@"
