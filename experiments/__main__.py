"""`python -m experiments` runs nothing; it names what does."""

import sys

print("error: say python -m experiments.run, experiments.sweep or experiments.show (see --help)", file=sys.stderr)
sys.exit(2)
