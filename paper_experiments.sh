#!/usr/bin/env bash
# The paper's experiments, from nothing to paper_plots.pdf.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: ./paper_experiments.sh [--quick] [--device D] [--output DIR] [key=value ...]

Makes the environment, gets CIFAR-10, runs the paper's suite with this library's solver and with
the published one, and draws paper_plots.pdf. Run again, it skips the runs that are finished.

  --quick       the same comparisons, small, on an embedded data set: no download, about two minutes
  --device D    auto (default), cpu, cuda or cuda:N
  --output DIR  where the runs go: DIR/paper, DIR/paper_published or DIR/quick, one folder a run
                (default: results/local, which git ignores)
  key=value     settings of every run instead of the configs' own, for example:
                epochs=10 seed=1 optimizer.lr=0.5 data.root=/data
                Give them an --output of their own: runs with other settings are not mixed.
USAGE
}

. "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"

quick=false
output="$ROOT/results/local"
data="$ROOT/data"
overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --quick) quick=true ;;
    --device | --output)
        [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value; see ./paper_experiments.sh --help"
        case "$1" in
        --device) overrides+=("device=$2") ;;
        --output) case "$2" in /*) output="$2" ;; *) output="$PWD/$2" ;; esac ;;
        esac
        shift
        ;;
    data.root=*) data="${1#*=}" && overrides+=("$1") ;;
    -*) die "unknown option $1; see ./paper_experiments.sh --help" ;;
    *=*) overrides+=("$1") ;;
    *) die "expected key=value, got '$1'; see ./paper_experiments.sh --help" ;;
    esac
    shift
done

use_environment experiments
cd "$ROOT"
if $quick; then
    configs=(configs/quick)
    plots=("$output/quick")
else
    ./get_data.sh --data "$data"
    configs=(configs/paper configs/paper_published)
    plots=("$output/paper" --published "$output/paper_published")
fi

# An empty array is an unbound variable to bash 3.2, hence the +.
"$PYTHON" -m experiments.sweep "${configs[@]}" ${overrides[@]+"${overrides[@]}"} --output "$output"
"$PYTHON" scripts/plot_paper.py "${plots[@]}" --output paper_plots.pdf

echo "wrote the runs to $output and the figures to $ROOT/paper_plots.pdf"
