#!/bin/sh
# Make .venv and install the locked packages into it. Run by the Makefile, only when constraints.txt changed.
# Usage: scripts/setup.sh [PYTHON]   (default: the first of python3.13, 3.12, 3.11, python3 that fits)
set -eu
cd "$(dirname "$0")/.."

# ensurepip is what Debian leaves out of an interpreter without its venv package.
fits='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
python=
for candidate in ${1:-python3.13 python3.12 python3.11 python3}; do
    if "$candidate" -c "$fits" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 with the venv module was found (tried: ${1:-python3.13 python3.12 python3.11 python3})." >&2
    echo "Install one (on Debian or Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3.12 demo" >&2
    exit 1
fi
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "error: this is $(uname -sm); the embedded default runs on Linux x86_64 only." >&2
    exit 1
fi

echo "Setting up .venv with $("$python" --version) (about a minute once pip has the packages in its cache) ..."
"$python" -m venv --clear .venv
# -qq: errors only; pip's warnings here are about the machine's own configuration, not about this project.
.venv/bin/python -m pip install -qq --root-user-action=ignore --disable-pip-version-check --no-input \
    --require-hashes -r constraints.txt
