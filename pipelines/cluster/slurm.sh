#!/usr/bin/env bash
#SBATCH --job-name=teacher-hierarchies
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# sbatch pipelines/cluster/slurm.sh IMAGES OUT [further flags of pipelines.build]
# One Ray node per Slurm node; a requeued job goes on from the last finished unit. Exit 75 asks for a requeue.
set -euo pipefail

images=${1:?usage: sbatch slurm.sh IMAGES OUT [flags]}
out=${2:?usage: sbatch slurm.sh IMAGES OUT [flags]}
shift 2
bin=${VENV:-.venv}/bin
export RAY_USAGE_STATS_ENABLED=0
# Only processes of this job may use its Ray: they need a random token. It travels in the environment, which srun
# passes on and which, unlike a file or a command line, other users of a node cannot read.
export RAY_AUTH_MODE=token SLURM_EXPORT_ENV=ALL
: "${RAY_AUTH_TOKEN:=$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))
address="$head:$port"

# Slurm from 22.05 on gives a step one CPU for each task, whatever the job asked for, unless the step says more.
srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" -w "$head" \
  "$bin/ray" start --head --port="$port" --dashboard-host=127.0.0.1 --num-cpus="$SLURM_CPUS_PER_TASK" --block &
sleep 10
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    "$bin/ray" start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
  sleep 10
fi

"$bin/python" -m pipelines.build "$images" --out "$out" --address "$address" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do # a forwarded TERM ends the wait, not the driver
  status=0
  wait "$driver" || status=$?
done
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
