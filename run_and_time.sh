#!/bin/bash
# Run one rank, in a job step of run.sub; or, outside of one, a whole run on this machine:
#
#   DATADIR=/data/cosmoflow CONFIG_FILE=reference DGXNGPU=8 ./run_and_time.sh
#
# docs/scale.md lists the variables. Arguments are passed to the trainer.
set -euo pipefail
cd "${CHECKOUT:-$(dirname "$0")}"

CONFIG_FILE="${CONFIG_FILE:-default}"
[[ -f "${CONFIG_FILE}" ]] || CONFIG_FILE="configs/${CONFIG_FILE%.yaml}.yaml"
PYTHON="${PYTHON:-.venv/bin/python}"
LOGDIR="${LOGDIR:-results}"
RUN="${RUN:-$(date +%y%m%d%H%M%S)}"

# Quote a value as a YAML string.
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
    # No launcher has started ranks: run this script once per rank.
    export CONFIG_FILE PYTHON LOGDIR RUN
    MPIRUN="$(dirname "${PYTHON}")/mpirun"
    [[ -x "${MPIRUN}" ]] || MPIRUN=mpirun
    exec "${MPIRUN}" -n "${DGXNGPU}" --bind-to none bash run_and_time.sh "$@"
fi

# A command prefix that binds a rank to the cores, memory and network cards near its GPU; {} is replaced by the local
# rank.
read -r -a BINDING <<<"${BIND:-}"
BINDING=("${BINDING[@]//\{\}/${SLURM_LOCALID:-${OMPI_COMM_WORLD_LOCAL_RANK:-0}}}")

# On these signals the trainer saves a checkpoint; this shell waits for it.
trap : TERM USR1
start="$(date +%s)"
status=0
"${BINDING[@]}" "${PYTHON}" -m cosmoflow_dali.train "${PARAMETERS[@]}" "$@" || status=$?
if [[ "${status}" -eq 0 && "${SLURM_PROCID:-${OMPI_COMM_WORLD_RANK:-0}}" -eq 0 ]]; then
    echo "RESULT,COSMOFLOW_HPC,,$(($(date +%s) - start)),${USER:-$(id -un)},$(date -d "@${start}" '+%F %T')"
fi
exit "${status}"
