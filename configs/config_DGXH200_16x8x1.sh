# shellcheck shell=bash
# 16 nodes of DGXH200 with 8 GPUs, one sample per GPU and step; configs/submission_dgxh100_16x8x1.yaml describes the expected result.
export DGXSYSTEM=DGXH200_16x8x1
export DGXNNODES="${DGXNODES:-16}"
export CONFIG_FILE=submission_dgxh100_16x8x1
export WALLTIME="${WALLTIME:-01:00:00}"
# shellcheck source=configs/config_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
