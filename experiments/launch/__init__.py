"""From a plan to runs carried out: one after the other here, side by side here, or on a cluster.

Each way takes planned runs and yields an `Outcome` for each, as they end. May import from all other rooms.
"""
