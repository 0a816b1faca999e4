"""CosmoFlow: the network, its training step, and the programs that train, evaluate and predict."""
