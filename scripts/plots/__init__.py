"""The figures of the paper's experiments: `figures` says what, the rest draws it."""
