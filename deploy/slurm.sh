#!/bin/bash
# A worker of a process pool on one node of a SLURM cluster, for as long as the job lasts:
#
#     mkdir -p .scratch && sbatch --export=ALL,VDMINI_POOL=gpu deploy/slurm.sh    # in a clone that no one edits
#
# A run that the time limit cuts off is ordered again, and goes on from its last checkpoint in the DVC remote.
#SBATCH --job-name=vdmini-worker
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=.scratch/slurm-%j.log
set -euo pipefail

: "${PREFECT_API_URL:?export it in the shell that calls sbatch}"
: "${MLFLOW_TRACKING_URI:?export it in the shell that calls sbatch}"
: "${VDMINI_POOL:=gpu}"

cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
PATIENCE_S=90 # of `stop` with a run that sends its last checkpoint

worker=
# SLURM signals this shell two minutes before the end. The run is told first, which sends its last checkpoint: a worker
# that is told first kills it.
# shellcheck disable=SC2329 # called by the trap
stop() {
    [ -n "$worker" ] || exit 143
    pkill -TERM -P "$worker" || true
    for ((waited = 0; waited < PATIENCE_S; waited++)); do
        pgrep -P "$worker" >/dev/null || break
        sleep 1
    done
    kill -TERM "$worker"
}
trap stop TERM
.venv/bin/vdmini worker --pool "$VDMINI_POOL" &
worker=$!
code=0
wait "$worker" || code=$?
while kill -0 "$worker" 2>/dev/null; do
    wait "$worker" || code=$?
done
exit "$code"
