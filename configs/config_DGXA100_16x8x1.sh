# shellcheck shell=bash
# 16 nodes of DGXA100 with 8 GPUs, one sample per GPU and step; configs/submission_dgxa100_16x8x1.yaml describes the expected result.
export DGXSYSTEM=DGXA100_16x8x1
export DGXNNODES="${DGXNODES:-16}"
export CONFIG_FILE=submission_dgxa100_16x8x1
export WALLTIME="${WALLTIME:-01:00:00}"
# shellcheck source=configs/config_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
