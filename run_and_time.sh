#!/bin/bash
# One rank of a run, as run.sub's job step starts it, or alone a whole run on this machine:
#
#   DATADIR=/data/cosmoflow CONFIG_FILE=reference DGXNGPU=8 ./run_and_time.sh
#
# docs/scale.md lists the variables. Arguments are the trainer's own.
set -euo pipefail
cd "${CHECKOUT:-$(dirname "$0")}"

CONFIG_FILE="${CONFIG_FILE:-default}"
[[ -f "${CONFIG_FILE}" ]] || CONFIG_FILE="configs/${CONFIG_FILE%.yaml}.yaml"
PYTHON="${PYTHON:-.venv/bin/python}"
LOGDIR="${LOGDIR:-results}"
RUN="${RUN:-$(date +%y%m%d%H%M%S)}"

# A value that YAML takes for text, whatever is in it.
text() {
    printf "'%s'" "${1//\'/\'\'}"
}

PARAMETERS=(--config "${CONFIG_FILE}" --run-dir "${LOGDIR}/${RUN}" --resume)
[[ -z "${DATADIR:-}" ]] || PARAMETERS+=(--data-dir "${DATADIR}")
[[ -z "${SEED:-}" ]] || PARAMETERS+=(--seed "${SEED}")
[[ -z "${STAGING_DIR:-}" ]] || PARAMETERS+=(--set "data.stage.dir=$(text "${STAGING_DIR}")")
[[ -z "${STAGED_SINCE:-}" ]] || PARAMETERS+=(--staged-since "${STAGED_SINCE}")
[[ -z "${DGXSYSTEM:-}" ]] || PARAMETERS+=(--set "submission.platform=$(text "${DGXSYSTEM}")")
[[ "${CACHES_CLEARED:-0}" -eq 0 ]] || PARAMETERS+=(--caches-cleared)

if [[ -z "${SLURM_STEP_NUM_TASKS:-}${OMPI_COMM_WORLD_SIZE:-}" && "${DGXNGPU:-1}" -gt 1 ]]; then
    # Nobody has started ranks yet: this script once more, for each.
    export CONFIG_FILE PYTHON LOGDIR RUN
    MPIRUN="$(dirname "${PYTHON}")/mpirun"
    [[ -x "${MPIRUN}" ]] || MPIRUN=mpirun
    exec "${MPIRUN}" -n "${DGXNGPU}" --bind-to none bash run_and_time.sh "$@"
fi

# A tool that binds a rank to the cores, memory and network cards near its GPU, as words that stand before the
# program; {} among them becomes the rank's place on its node.
read -r -a BINDING <<<"${BIND:-}"
BINDING=("${BINDING[@]//\{\}/${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}}")

# The trainer saves where it is asked to stop, and this shell waits for it.
trap : TERM USR1
start="$(date +%s)"
status=0
"${BINDING[@]}" "${PYTHON}" -m cosmoflow_dali.train "${PARAMETERS[@]}" "$@" || status=$?
if [[ "${status}" -eq 0 && "${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-0}}" -eq 0 ]]; then
    echo "RESULT,COSMOFLOW_HPC,,$(($(date +%s) - start)),${USER:-$(id -un)},$(date -d "@${start}" '+%F %T')"
fi
exit "${status}"
