#!/bin/bash
# Run one rank, in a job step of run.sub; or, outside of one, a whole run on this machine:
#
#   DATADIR=/data/cosmoflow CONFIG_FILE=reference DGXNGPU=8 ./run_and_time.sh
#
# docs/scale.md lists the variables. Arguments are passed to the trainer. Relative names are those of the working
# folder.
set -euo pipefail
SCRIPT="$0"
[[ ! -L "${SCRIPT}" ]] || SCRIPT="$(realpath "${SCRIPT}")"
CHECKOUT="$(realpath -s "${CHECKOUT:-$(dirname "${SCRIPT}")}")"
# The modules of the checkout, and none of the working folder.
export PYTHONPATH="${CHECKOUT}${PYTHONPATH:+:${PYTHONPATH}}" PYTHONSAFEPATH=1

if [[ -z "${CONFIG_FILE:-}" || ! -f "${CONFIG_FILE}" ]]; then
    CONFIG_FILE="${CONFIG_FILE:-default}"
    CONFIG_FILE="${CONFIG_FILE#configs/}"
    CONFIG_FILE="${CHECKOUT}/configs/${CONFIG_FILE%.yaml}.yaml"
fi
PYTHON="${PYTHON:-${CHECKOUT}/.venv/bin/python}"
LOGDIR="${LOGDIR:-results}"
# To the nanosecond, as many runs may start in the same second.
RUN="${RUN:-$(date +%y%m%d%H%M%S.%N)}"

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

WORLD="$("${PYTHON}" -c 'from pipelines.distributed.cli import launched as w; print(w().rank, w().local_rank, w().size)')"
read -r RANK_NUMBER LOCAL_RANK_NUMBER SIZE <<<"${WORLD}"

if [[ "${SIZE}" -eq 1 && "${DGXNGPU:-1}" -gt 1 ]]; then
    # No launcher has started ranks: run this script once per rank.
    export CONFIG_FILE PYTHON LOGDIR RUN
    MPIRUN="$(dirname "${PYTHON}")/mpirun"
    [[ -x "${MPIRUN}" ]] || MPIRUN=mpirun
    exec "${MPIRUN}" -n "${DGXNGPU}" --bind-to none bash "${CHECKOUT}/run_and_time.sh" "$@"
fi

# A command prefix that binds a rank to the cores, memory and network cards near its GPU; {} is replaced by the local
# rank.
read -r -a BINDING <<<"${BIND:-}"
BINDING=("${BINDING[@]//\{\}/${LOCAL_RANK_NUMBER}}")

# On these signals the trainer saves a checkpoint; this shell waits for it.
trap : TERM USR1
start="$(date +%s)"
status=0
"${BINDING[@]}" "${PYTHON}" -m cosmoflow_dali.train "${PARAMETERS[@]}" "$@" || status=$?
if [[ "${status}" -eq 0 && "${RANK_NUMBER}" -eq 0 ]]; then
    echo "RESULT,COSMOFLOW_HPC,,$(($(date +%s) - start)),${USER:-$(id -un)},$(date -d "@${start}" '+%F %T')"
fi
exit "${status}"
