"""Making data sets: simulated universes, and conversion between the formats."""
