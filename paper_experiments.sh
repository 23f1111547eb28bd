#!/usr/bin/env bash
# The paper's experiments, from nothing to paper_plots.pdf.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as by `sh paper_experiments.sh`
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: ./paper_experiments.sh [--quick | --everything] [--seeds N] [--device D] [--output DIR]
                              [--overwrite] [--jobs N] [--devices D,D] [key=value ...]

Makes the environment, gets CIFAR-10, runs the paper's Figures 2 and 3 with this library's solver
and with the published one, and draws paper_plots.pdf. Stopped at any time and run again, it skips
the runs that are finished and goes on with the one that was under way.

  --quick       the same comparisons, small, on an embedded data set: no download, about a minute
  --everything  Table 1, too (63 runs), and BackProp for the 1000 epochs of the authors' script; without
                it BackProp stops once its curve over time is as long as the longest of ProxProp's
  --seeds N     every run with the seeds 0 to N-1: the figures show the mean, and a band from
                the lowest to the highest
  --device D    auto (default), cpu, cuda or cuda:N
  --output DIR  where the runs go, one folder a run: DIR/paper, DIR/paper_text and so on, as the
                folders of configs are named (default: results/local, which git ignores); the figures
                go to paper_plots.pdf beside this script, in place of those of the call before
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
everything=false
download=true
output="$ROOT/results/local"
data="$ROOT/data"
settings=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage && exit ;;
    --quick) quick=true ;;
    --everything) everything=true ;;
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
    baselines=()
    plots=("$output/quick")
else
    configs=(configs/paper/*_{cg*,exact}.yaml configs/paper_published configs/paper_text/*_cg*.yaml configs/paper_text_published)
    baselines=(configs/paper/*_gradient.yaml configs/paper_text/*_gradient.yaml)
    plots=("$output/paper" "$output/paper_text" --published "$output/paper_published" "$output/paper_text_published")
    if $everything; then
        configs+=("${baselines[@]}" configs/sweeps/table1.yaml)
        baselines=()
        plots+=(--table1 "$output/table1")
    fi
fi

# Runs a sweep of the given configs and settings; its worst exit code is in worst. In the background, as bash would pass
# on no signal to a command that it waits for.
worst=0
run_sweep() {
    local child status
    # The user's settings last, as the last one counts. (An empty array is an unbound variable to bash 3.2, hence the +.)
    "$PYTHON" -m experiments.sweep "$@" ${settings[@]+"${settings[@]}"} --output "$output" &
    child=$!
    # shellcheck disable=SC2064
    trap "kill -TERM $child" TERM HUP
    trap : INT # a terminal sends it to the sweep, too
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - TERM HUP INT
    # 1: some runs failed, and the figures show the others and name what is missing.
    [ "$status" -le 1 ] || exit "$status"
    [ "$status" -eq 0 ] || worst=$status
}

# A typo shows before a download of 170 MB, not after.
run_sweep --check "${configs[@]}" ${baselines[@]+"${baselines[@]}"}
if $download; then ./get_data.sh --data "$data"; fi

run_sweep "${configs[@]}"
for baseline in ${baselines[@]+"${baselines[@]}"}; do
    folder="$output/$(basename "$(dirname "$baseline")")"
    limit="$("$PYTHON" scripts/longest_curve.py "$folder" "$(basename "$baseline" .yaml)")"
    run_sweep "$baseline" "time_limit=$limit"
done

"$PYTHON" scripts/plot_paper.py "${plots[@]}" --output paper_plots.pdf
say "wrote the runs to $output and the figures to $ROOT/paper_plots.pdf"
exit "$worst"
