"""What the paper reports, to be set beside what was measured.

Read from the text of the ICLR 2018 submission (Frerix et al., Proximal Backpropagation); the final version may differ.
"""

from __future__ import annotations

from math import nan

STEP_SIZES = (50.0, 10.0, 5.0, 1.0, 0.5, 0.1, 0.05, 0.005, 0.0005)

TABLE_1 = {
    "gradient": (nan, nan, nan, nan, nan, 0.524, 0.091, 0.637, 1.531),
    "cg1": (77.9, 0.079, 0.145, 0.667, 0.991, 1.481, 1.593, 1.881, 2.184),
    "cg3": (94.7, 0.644, 0.031, 0.002, 0.012, 1.029, 1.334, 1.814, 2.175),
    "cg5": (66.5, 0.190, 0.027, 0.0003, 0.002, 0.399, 1.049, 1.765, 2.175),
}
"""Table 1: the MLP's full-batch loss after 50 epochs at each of the step sizes; NaN as it stands there."""

MLP_TEST_ACCURACY = {"gradient": 0.54, "proxprop": 0.56}
"""Section 5.1, with "about"."""

CONVNET_BEST_VAL_ACCURACY = {"gradient": 0.717, "proxprop": 0.729}
"""Section 5.3, after 50 epochs."""
