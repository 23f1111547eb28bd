"""Ways to carry out many runs: one after the other here, side by side here, or on a cluster.

Each takes planned runs and yields an `Outcome` for each, as they end.
"""
