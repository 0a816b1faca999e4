# shellcheck shell=bash
# Settings of all systems, sourced by their configurations.
export DGXNGPU="${DGXNGPU:-8}"

# Place for NCCL's settings (NCCL_IB_HCA, NCCL_SOCKET_IFNAME, ...); it detects InfiniBand itself.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
