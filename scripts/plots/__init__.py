"""The figures of the paper's experiments: `figures` says what, the rest draws it.

Import this before matplotlib: a user's backend and matplotlibrc are not for these figures.
"""

import os

os.environ["MPLBACKEND"] = "agg"
os.environ["MATPLOTLIBRC"] = os.devnull
