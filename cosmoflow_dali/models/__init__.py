"""Networks: MLPerf HPC's reference network, the open network, and the blocks that both consist of.

In: volumes (B, 4, D, H, W) of log(count + 1). Out: targets (B, 4). Models read no samples.
"""
