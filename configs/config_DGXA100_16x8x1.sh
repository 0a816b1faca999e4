# shellcheck shell=bash
# 16 nodes of DGXA100 with 8 GPUs of one sample a step each; configs/submission_dgxa100_16x8x1.yaml tells what to expect.
export DGXSYSTEM=DGXA100_16x8x1
export DGXNNODES="${DGXNODES:-16}"
export CONFIG_FILE=submission_dgxa100_16x8x1
export WALLTIME="${WALLTIME:-01:00:00}"
# shellcheck source=configs/config_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
