#!/usr/bin/env bash
# Make a virtual environment with a stack, the test tools and flashrl itself: install.sh FOLDER cpu|gpu (`make setup` and
# `make gpu` call it).
#
# Needs Python 3.11 or 3.12 ($PYTHON names one); the CPU stack also needs $TORCH_INDEX, where torch's CPU build is.
# The GPU stack comes from the package index alone, and needs no GPU to be installed. uv is used where it is
# found, else fetched with pip, else done without. The lists are complete, so nothing is resolved; everything is
# byte-compiled, because each Ray actor imports the stack anew.
# Safe to run again: what is there is kept.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=$1
STACK=$2
TORCH=$(grep '^torch==' "requirements/$STACK.txt")
SUITABLE='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

# A name on the PATH proves nothing: version managers leave shims there for versions that they do not run.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c "$SUITABLE" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    cat >&2 <<EOF
error: no Python 3.11 or 3.12 with venv and pip among: ${PYTHON:-python3.11 python3.12 python3}
hint: install one (Debian, Ubuntu: apt install python3.11-venv), or name one with PYTHON=/path/to/python3.11
EOF
    return 2
}

find_uv() {
    command -v uv && return
    "$VENV/bin/python" -m pip install --quiet "$(grep '^uv==' requirements/dev.txt)" >&2 || return 0
    echo "$VENV/bin/uv"
}

# install ARGUMENT…: with the options that uv and pip share.
install() {
    if [ -n "$UV" ]; then
        "$UV" pip install --python "$VENV/bin/python" --compile-bytecode --no-deps "$@"
    else
        "$VENV/bin/python" -m pip install --no-deps "$@"
    fi
}

# Prints the options that lead to torch's wheel: a folder of $PIP_FIND_LINKS that holds it, else the index.
torch_source() {
    local folder tag
    tag=$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    for folder in ${PIP_FIND_LINKS:-}; do
        if compgen -G "$folder/torch-${TORCH#torch==}-$tag-$tag-*_$(uname -m).whl" >/dev/null; then
            echo "--no-index --find-links $folder"
            return
        fi
    done
    echo "--index-url $TORCH_INDEX"
}

python=$(find_python)
echo "Setting up $VENV: $("$python" --version), the ${STACK^^} stack, flashrl"
"$python" -m venv "$VENV"
UV=$(find_uv)
if [ "$STACK" = cpu ]; then
    # shellcheck disable=SC2046  # options and values, split on purpose
    if ! install $(torch_source) "$TORCH"; then
        echo "hint: without that index, put the wheel of $TORCH into a folder and name it in PIP_FIND_LINKS" >&2
        exit 3
    fi
fi
install -r "requirements/$STACK.txt" -r requirements/dev.txt
# one of its packages has no wheel: everything else goes on without a C compiler
install -r requirements/gym.txt || echo "note: no reasoning-gym (rg: tasks) without a C compiler" >&2
install --no-build-isolation --editable .
if [ -z "$UV" ]; then
    # some packages ship templates that are no Python, which compileall counts as errors
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" >/dev/null || true
fi
