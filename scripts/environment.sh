# shellcheck shell=bash
# Sourced by the entry scripts, which run in bash 3.2 (macOS) and newer.
#
#   find_python                 sets PYTHON to a Python 3.10+; enough for scripts/get_data.py
#   use_environment EXTRA ...   sets PYTHON to one that has the library's requirements and those
#                               of pyproject.toml's named extras: the active environment where
#                               it has them, else .venv, which is made here

unset CDPATH                               # with it, cd may go elsewhere, and prints where
unset PYTHONSAFEPATH                       # with it, python -m does not find what is in this folder
export PIP_USER=0                          # whatever pip's configuration says, an environment is what it installs into
unset PIP_TARGET PIP_PREFIX PIP_ROOT
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
OLDEST_PYTHON="3.10"

# One line on stderr; 2 is the exit code of every user error.
die() {
    echo "error: $*" >&2 || :
    exit 2
}

# A line on stdout, which may be closed or full: that stops nothing.
say() {
    echo "$*" 2>/dev/null || :
}

# version_of PYTHON: prints "3.11"; fails where PYTHON does not run.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_new_enough() {
    "$1" -c "import sys; sys.exit(sys.version_info[:2] < (${OLDEST_PYTHON/./, }))" 2>/dev/null
}

# The active environment's Python first, then what PATH has.
find_python() {
    local candidate version found=""
    for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
        "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        # A name may be on PATH and yet not run (a shim of a version manager).
        version="$(version_of "$candidate")" || continue
        if is_new_enough "$candidate"; then
            PYTHON="$candidate"
            return
        fi
        found="${found:+$found, }$candidate is $version"
    done
    die "Python $OLDEST_PYTHON or newer is needed; found ${found:-none on PATH}"
}

checksum() {
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

use_environment() {
    local lacking
    find_python
    if lacking="$("$PYTHON" "$ROOT/scripts/check_environment.py" "$@")"; then
        say "environment: $PYTHON ($(version_of "$PYTHON")), which has what is needed"
        return
    fi
    use_venv "$lacking" "$@"
}

# The stamp is written last: an interrupted install, or new pins, are installed again.
use_venv() {
    local venv="$ROOT/.venv" wanted lacking="$1"
    shift
    local stamp="$venv/.requirements.sha256"
    wanted="$(checksum "$ROOT/requirements.txt")"
    if is_new_enough "$venv/bin/python" && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        PYTHON="$venv/bin/python"
        say "environment: .venv ($(version_of "$PYTHON"))"
        return
    fi
    if [ -L "$venv" ]; then
        use_linked "$venv" "$@"
        return
    fi

    say "environment: installing requirements.txt into .venv with Python $(version_of "$PYTHON")" \
        "(minutes; about 6 GB on Linux); $PYTHON lacks $lacking"
    local with_uv=false
    uv_will_do && with_uv=true
    if ! is_new_enough "$venv/bin/python"; then
        make_venv "$venv"
    fi
    PYTHON="$venv/bin/python"
    rm -f "$stamp"
    { $with_uv && install_with_uv; } || install_with_pip "$lacking"
    echo "$wanted" >"$stamp"
}

# An environment elsewhere may serve other projects: it is used as it is, or not at all.
use_linked() {
    local venv="$1" lacking
    shift
    is_new_enough "$venv/bin/python" ||
        die "$venv is a link to what has no Python $OLDEST_PYTHON or newer: remove the link and run this again"
    lacking="$("$venv/bin/python" "$ROOT/scripts/check_environment.py" "$@")" ||
        die "$venv is a link to an environment that lacks $lacking: install that there, or remove the link," \
            "and run this again"
    PYTHON="$venv/bin/python"
    say "environment: .venv ($(version_of "$PYTHON")), a link to one that has what is needed"
}

make_venv() {
    if "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        "$PYTHON" -m venv --clear "$1" || die "$PYTHON could not make $1"
    elif has_uv; then # which needs neither
        rm -rf "$1"
        uv venv --quiet --python "$PYTHON" "$1" || die "uv could not make $1 with $PYTHON"
    else
        die "$PYTHON cannot make a virtual environment (no ensurepip); install it," \
            "on Debian and Ubuntu: apt install python$(version_of "$PYTHON")-venv"
    fi
}

has_uv() {
    command -v uv >/dev/null 2>&1
}

# uv is faster, but does not read where pip is told to look for packages.
uv_will_do() {
    has_uv || return 1
    case "$("$PYTHON" -m pip config list 2>/dev/null)" in
    *index* | *links* | *constraint* | *proxy* | *cert* | *host*) return 1 ;;
    esac
}

install_with_uv() {
    say "environment: with uv, which is on PATH"
    uv pip install --quiet --python "$PYTHON" -r "$ROOT/requirements.txt" && return
    say "environment: uv could not (its message is above); with pip"
    return 1
}

install_with_pip() {
    # uv makes environments without pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        die ".venv has no pip, and its Python no ensurepip to get it: remove $ROOT/.venv and run this again"
    local quiet="--quiet"
    [ -t 1 ] && quiet="--progress-bar=on"
    "$PYTHON" -m pip install --disable-pip-version-check "$quiet" -r "$ROOT/requirements.txt" ||
        die "pip could not install requirements.txt into .venv (its message is above);" \
            "run this again, or activate an environment that has: $1"
}
