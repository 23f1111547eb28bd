#!/usr/bin/env bash
# The paper's experiments, from nothing to paper_plots.pdf.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as by `sh paper_experiments.sh`
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: ./paper_experiments.sh [--quick] [--seeds N] [--device D] [--output DIR] [--overwrite]
                              [--jobs N] [--devices D,D] [key=value ...]

Makes the environment, gets CIFAR-10, runs the paper's suite with this library's solver and with
the published one, and draws paper_plots.pdf. Stopped at any time and run again, it skips the
runs that are finished and goes on with the one that was under way.

  --quick       the same comparisons, small, on an embedded data set: no download, under a minute
  --seeds N     every run with the seeds 0 to N-1: the figures show the mean, and one standard
                deviation about it as a band
  --device D    auto (default), cpu, cuda or cuda:N
  --output DIR  where the runs go: DIR/paper, DIR/paper_published or DIR/quick, one folder a run
                (default: results/local, which git ignores)
  key=value     settings of every run instead of the configs' own, for example:
                epochs=10 seed=1 optimizer.lr=0.5 data.root=/data
                Give them an --output of their own: runs with other settings are not mixed.
  --overwrite   run all again from the start
  --jobs N      runs at a time, sharing the CPU's threads or --devices (default: one; seconds
                in the figures mean something for one run a device alone)
  --devices D,D devices to share out, e.g. cuda:0,cuda:1
USAGE
}

here="$(readlink -f "${BASH_SOURCE[0]}" 2>/dev/null)" || here="${BASH_SOURCE[0]}" # also through a symlink
. "$(dirname "$here")/scripts/environment.sh"

quick=false
download=true
output="$ROOT/results/local"
data="$ROOT/data"
settings=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --quick) quick=true ;;
    --overwrite) settings+=("$1") ;;
    --device | --output | --seeds | --jobs | --devices)
        [ -n "${2:-}" ] || die "$1 needs a value; see ./paper_experiments.sh --help"
        case "$1" in
        --device) settings+=("device=$2") ;;
        --output) case "$2" in /* | "~"*) output="$2" ;; *) output="$PWD/$2" ;; esac ;;
        *) settings+=("$1" "$2") ;;
        esac
        shift
        ;;
    data.root=*) data="${1#*=}" && settings+=("$1") ;;
    data.name=digits) download=false && settings+=("$1") ;;
    -*) die "unknown option $1; see ./paper_experiments.sh --help" ;;
    *=*) settings+=("$1") ;;
    *) die "expected key=value, got '$1'; see ./paper_experiments.sh --help" ;;
    esac
    shift
done

trap '' PIPE # `| head` ends what is printed, not the runs
use_environment experiments
cd "$ROOT"
if $quick; then
    download=false
    configs=(configs/quick)
    plots=("$output/quick")
else
    configs=(configs/paper configs/paper_published)
    plots=("$output/paper" --published "$output/paper_published")
fi

# An empty array is an unbound variable to bash 3.2, hence the +.
sweep=("$PYTHON" -m experiments.sweep "${configs[@]}" ${settings[@]+"${settings[@]}"} --output "$output")

# A typo shows before a download of 170 MB, not after.
"${sweep[@]}" --check
if $download; then ./get_data.sh --data "$data"; fi

# In the background, as bash would pass on no signal to a command that it waits for.
"${sweep[@]}" &
child=$!
trap 'kill -TERM "$child"' TERM HUP
trap : INT # a terminal sends it to the sweep, too
while :; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
done
trap - TERM HUP INT
# 1: some runs failed, and the figures show the others and name what is missing.
[ "$status" -le 1 ] || exit "$status"

"$PYTHON" scripts/plot_paper.py "${plots[@]}" --output paper_plots.pdf
say "wrote the runs to $output and the figures to $ROOT/paper_plots.pdf"
exit "$status"
