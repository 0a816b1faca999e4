"""All rows of the table of loaders, in its order."""

from __future__ import annotations

from benchmarks.peers import dali, ours, shards, tf_data, threads, torch_loaders

PEERS = {
    peer.name: peer
    for family in (ours, torch_loaders, dali, shards, threads, tf_data)
    for peer in family.PEERS
}
