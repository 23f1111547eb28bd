#!/usr/bin/env bash
# Puts CIFAR-10 into data/: ./get_data.sh --help
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
find_python
exec "$PYTHON" "$ROOT/scripts/get_data.py" "$@"
