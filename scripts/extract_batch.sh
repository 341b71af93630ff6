#!/usr/bin/env bash
# Extract features with many processes. Every process takes its share of the clips; none waits for another one, and
# whichever finishes last completes the manifest. Killed or failed, start it again: only what is missing is done.
#
#   scripts/extract_batch.sh clips.tsv data/train --format memmap --variant small_16k --selva_dir weights
#
# One process per GPU of this machine, or one if it has none. PROCESSES=4 sets the number.
#
# Several machines that share the output folder: run this on every one, with the same arguments and
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 scripts/extract_batch.sh ...        # NODE_RANK=1 on the second
#
# A job array instead (here Slurm, 16 independent jobs in any order; no network between them is needed):
#
#   sbatch --array=1-16 --gres=gpu:1 --wrap 'SHARD=$SLURM_ARRAY_TASK_ID/16 scripts/extract_batch.sh clips.tsv data/train'
#
# All ways can be mixed: SHARD=1/2 on one machine and SHARD=2/2 on another one, each with all its GPUs.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 INPUT OUTPUT_DIR [options of extract_features.py]" >&2
    exit 2
fi
input=$1
output_dir=$2
shift 2

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
processes=${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# The processes never talk to each other, so torchrun only has to start them: --standalone finds a free port by itself.
where=(--standalone)
if [ "${NNODES:-1}" -gt 1 ]; then
    where=(--nnodes="$NNODES" --node_rank="${NODE_RANK:?}" --master_addr="${MASTER_ADDR:?}"
           --master_port="${MASTER_PORT:-29500}")
fi

exec torchrun "${where[@]}" --nproc_per_node="$processes" "$repository/extract_features.py" "$input" \
    --output_dir "$output_dir" ${SHARD:+--shard "$SHARD"} "$@"
