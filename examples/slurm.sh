#!/bin/bash
# Train on several machines under Slurm: one torchrun on each, which starts a process for each GPU.
#
#     sbatch --nodes 8 examples/slurm.sh train-lm --recipe latentlm-13b --data latents/imagenet \
#         --set trainer.parallel=fsdp --set trainer.shard_size=8 --set trainer.recompute=true
#
# Everything after the script's name is what stands after `latentlm`. The workspace is the folder
# that sbatch is called in, or LATENTLM_HOME; all machines must see it.
#
# Five minutes before the time limit the processes are asked to stop. They save, the job goes back
# into the queue, and the same command goes on where it stopped. Slurm does the same with a job that
# it preempts, or whose machine fails (which goes on from the last checkpoint). A run that fails, or
# is done, is not put back.
#SBATCH --job-name=latentlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=latentlm-%j.log
set -u

# Seconds that torchrun gives its processes to save, after which it kills them; its own 30 are few.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

stopped=
trap 'stopped=yes; interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# --wait: once torchrun has ended on one machine, the others have so many seconds.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=600 \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
    -m latentlm_cli "$@" &
job=$!
while
    interrupted=
    wait "$job"
    status=$?
    [ -n "$interrupted" ] # a signal ends `wait`, and not what it waits for
do :; done

if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
