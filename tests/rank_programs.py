"""Programs for the ranks that tests start, as text."""

HEAD = """
import sys, time
import torch
import torch.distributed as dist
from pipelines.distributed.cli import report_errors
from pipelines.distributed.session import RankError, exit_now
from pipelines.distributed.world import World
from pipelines.errors import UserError
world = World.detect()
"""

CONNECT = (
    HEAD
    + """
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    print(world.launcher, session.sum(torch.tensor([10.0 ** world.rank])).item())
"""
)
