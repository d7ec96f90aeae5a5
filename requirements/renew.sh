#!/usr/bin/env bash
# Resolve the two pinned stacks and the test tools anew: `make lock`, after a change of an .in file or of pyproject.toml.
#
# Reads metadata only and installs nothing. Pins that still fit stay; `make lock UPGRADE=1` takes the newest of everything.
# Resolved for Python 3.11 on x86_64 Linux, then held against 3.12: one list must serve both.
set -euo pipefail
cd "$(dirname "$0")"

UV=${UV:-uv}
EXTRAS=(../pyproject.toml --extra data --extra plot --extra eval)

# resolve NAME ARGUMENT…: pins NAME.txt, and fails where Python 3.12 would need another list.
resolve() {
    local name=$1 checked
    shift
    checked=$(mktemp)
    compile 3.11 "$@" --output-file "$name.txt"
    compile 3.12 "$@" --constraints "$name.txt" >"$checked"
    diff <(pins "$name.txt") <(pins "$checked") || { echo "error: $name.txt does not serve Python 3.12" >&2 && return 1; }
    rm "$checked"
}

compile() {
    local python=$1
    shift
    "$UV" pip compile --quiet --no-header ${UPGRADE:+--upgrade} --python-version "$python" --python-platform x86_64-manylinux_2_28 "$@"
}

pins() { grep -oE '^[a-zA-Z0-9._-]+==[^ ;]+' "$1"; }

# headed NAME LINE…: puts the lines over NAME.txt, which uv drops at each resolution.
headed() {
    local file=$1.txt resolved
    shift
    resolved=$(grep -vE '^(torch==.*\+cpu|# (made|what) .*|)$' "$file")
    printf '%s\n' "$@" '' "$resolved" >"$file"
}

resolve cpu cpu.in "${EXTRAS[@]}" --excludes leave-out.txt
# Intel's OpenMP runtime exists for x86_64 only, and vLLM asks for it there only
sed -i -E "s/^(intel-[a-z-]+==[^ ;]+).*/\1 ; platform_machine == 'x86_64'/" cpu.txt
headed cpu '# made by requirements/renew.sh (`make lock`) from cpu.in and pyproject.toml; not to be edited by hand' \
    '# what it is: the whole CPU stack. Install it without resolving: `pip install --no-deps -r`; torch first, see install.sh' \
    "$(grep '^torch==' cpu.in)"

resolve dev dev.in --constraints cpu.txt
headed dev '# made by requirements/renew.sh (`make lock`) from dev.in; not to be edited by hand' \
    '# what it is: the tools of `make test`, beside cpu.txt. Install it without resolving: `pip install --no-deps -r`'

resolve gym gym.in --no-deps --constraints cpu.txt
headed gym '# made by requirements/renew.sh (`make lock`) from gym.in; not to be edited by hand' \
    '# what it is: reasoning-gym, beside either stack. Install it without resolving: `pip install --no-deps -r`'

# constrained by the test tools, which `make gpu` installs beside it
resolve gpu gpu.in "${EXTRAS[@]}" --constraints dev.txt
headed gpu '# made by requirements/renew.sh (`make lock`) from gpu.in and pyproject.toml; not to be edited by hand' \
    '# what it is: the whole GPU stack (Linux, x86_64, CUDA 13). `make gpu` installs it; `pip install --no-deps -r` does, too'
