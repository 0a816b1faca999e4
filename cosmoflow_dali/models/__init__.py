"""The networks: MLPerf HPC's reference network, the open network, and the blocks they are built of.

In: volumes (B, 4, D, H, W) of log(count + 1). Out: targets (B, 4). Nothing here reads samples.
"""
