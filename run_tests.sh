#!/usr/bin/env bash
# Lint, types and tests, as continuous integration runs them. Arguments go to pytest:
#   ./run_tests.sh -k figures
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as by `sh run_tests.sh`
set -euo pipefail

here="$(readlink -f "${BASH_SOURCE[0]}" 2>/dev/null)" || here="${BASH_SOURCE[0]}" # also through a symlink
. "$(dirname "$here")/scripts/environment.sh"
use_environment experiments dev
cd "$ROOT"

# A user's own files are the user's: what git tracks is linted, and all where there is no git, as in an archive.
files=()
while IFS= read -r file; do
    [ ! -f "$file" ] || files+=("$file") # one that is deleted is still tracked
done <<<"$(git -c core.quotePath=false ls-files '*.py' 2>/dev/null)"
[ ${#files[@]} -gt 0 ] || files=(.)
"$PYTHON" -m ruff check pyproject.toml "${files[@]}"
"$PYTHON" -m ruff format --check "${files[@]}"
# Beside the tests, as it takes as long as several of them; its words come at the end.
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
"$PYTHON" -m mypy proxprop >"$types" 2>&1 &
mypy=$!

# Side by side, with a thread each: on small tensors, more threads only wait for each other. With arguments, which
# usually select few tests, in one process, which starts sooner; `-n 2` among them starts two.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist worksteal
code=0
"$PYTHON" -m pytest "$@" || code=$?
wait "$mypy" || code=$((code ? code : $?))
cat "$types" || : # to whom reads no more
exit "$code"
