"""The paper's experiments. `run`, `sweep` and `show` are what a person starts; behind them are rooms.

Each imports from those before it alone: `command`, `data` and `config`, `training`, `folder`, `launch`.
"""
