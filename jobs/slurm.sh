#!/bin/bash
# Written by `sdft submit --print-slurm`. Not run under Slurm by the maintainers; tested with a stand-in for srun and a real Ray.
# Read it, add account, partition and time, activate the environment, then here: sbatch FILE
# Submitted again, or requeued, it goes on from what is under the root.
#SBATCH --job-name=sdft-gsm8k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=1
# Whole nodes (mem=0: all of their memory): at its end Ray stops all that this user has of Ray on a node.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

for name in sdft ray; do
  if ! command -v "$name" > /dev/null; then
    echo "PATH: $name is not on $(hostname). Activate its environment before sbatch." >&2
    exit 2
  fi
done

# The first node is the head. Its name may stand for a loopback address, which other nodes do not reach.
address=$(hostname --all-ip-addresses | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 RAY_USAGE_STATS_ENABLED=0
# Whoever reaches the head could run code: only with this job's token, which srun hands to every node.
RAY_AUTH_TOKEN=$(od --address-radix=n --read-bytes=32 --format=x1 /dev/urandom | tr --delete ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
cat > "$work/compute.yaml" <<'COMPUTE'
ray:
  address: auto
  wait_seconds: 1800
score:
  actors: 1
  cpus: 4
  gpus: 1
  batch_size: 16
distill:
  actors: 8
  cpus: 4
  gpus: 1
  batch_rows: 4096
  piece_rows: 64
  engine:
    enforce_eager: false
    max_num_seqs: 256
    gpu_memory_utilization: 0.9
train:
  workers: 8
  cpus: 4
  gpus: 1
  zero_stage: 3
  micro_batch: 2
  checkpoint_every_steps: 50
evaluate:
  cpus: 4
  gpus: 1
  batch_size: 32
COMPUTE
# A Ray that does not start ends with exit code 0 as well, so the command leaves its own.
cat > "$work/command.sh" <<'COMMAND'
sdft run configs/recipes/gsm8k.yaml --root /shared/artifacts --compute "$1/compute.yaml"
echo $? > "$1/code"
COMMAND

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=4 \
  ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus=4 --num-gpus=1 -- bash "$work/command.sh" "$work" \
  || echo "srun: ended with exit code $?" >&2

if [ ! -f "$work/code" ]; then
  echo "ray: did not start on all $SLURM_JOB_NUM_NODES nodes, so nothing was run. See above, and submit again." >&2
  exit 1
fi
exit "$(cat "$work/code")"
