"""Samples from storage to the device that trains: formats, data sets, plan of an epoch, loader, ranks.

In: files of samples on any number of nodes. Out: batches on each rank's device, in an order planned ahead.
"""
