#!/usr/bin/env bash
# Puts CIFAR-10 into data/: ./get_data.sh --help
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as by `sh get_data.sh`
set -euo pipefail

here="$(readlink -f "${BASH_SOURCE[0]}" 2>/dev/null)" || here="${BASH_SOURCE[0]}" # also through a symlink
. "$(dirname "$here")/scripts/environment.sh"
find_python
exec "$PYTHON" "$ROOT/scripts/get_data.py" "$@"
