"""Samples from storage to the device that trains: plan, formats, DALI graph, loader."""
