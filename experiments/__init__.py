"""The paper's experiments: validated configs, data, networks, training and what a run records."""
