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
"$PYTHON" -m pytest "$@"
