# shellcheck shell=bash
# 128 nodes of DGXA100 with 8 GPUs, one sample per GPU and step; configs/submission_dgxa100_128x8x1_other.yaml describes the expected result.
export DGXSYSTEM=DGXA100_128x8x1_other
export DGXNNODES="${DGXNODES:-128}"
export CONFIG_FILE=submission_dgxa100_128x8x1_other
export WALLTIME="${WALLTIME:-01:00:00}"
# shellcheck source=configs/config_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
