# shellcheck shell=bash
# What all systems share; their own configurations source it.
export DGXNGPU="${DGXNGPU:-8}"

# What NCCL takes its settings from (NCCL_IB_HCA, NCCL_SOCKET_IFNAME, ...) belongs here; it finds InfiniBand itself.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
