#!/usr/bin/env bash
# Lint, types and tests, as continuous integration runs them. Arguments go to pytest:
#   ./run_tests.sh -k figures
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
use_environment experiments dev
cd "$ROOT"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy proxprop

# Side by side, with a thread each: on small tensors, more threads only wait for each other. With arguments, which
# usually select few tests, in one process, which starts sooner; `-n 2` among them starts two.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist worksteal
"$PYTHON" -m pytest "$@"
