#!/bin/sh
# Write constraints.txt, constraints-gpu.txt and constraints-head.txt anew from pyproject.toml, with the hashes of every wheel of each version.
# Versions already locked stay unless a requirement forbids them; `make lock UPGRADE=--upgrade` takes the newest.
# Usage: scripts/lock.sh PYTHON [--upgrade]   (PYTHON: the oldest supported one, so that its backports are in the lock)
set -eu
cd "$(dirname "$0")/.."

"$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
    echo "error: locking needs Python 3.11, the oldest supported; name it: make lock PYTHON=/path/to/python3.11" >&2
    exit 1
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$1" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install -qq --root-user-action=ignore 'pip-tools==7.6.2'

# Nothing of the machine (index, host, path) may get into the files: every --no-emit option is there for that.
compile() {
    "$scratch/venv/bin/pip-compile" --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options "$@"
}
# The extra client is grpcio: heads and embedded clusters need it; GPU nodes and zone nodes do without.
compile ${2:-} --extra client --extra demo --extra dev --build-deps-for editable --output-file constraints.txt pyproject.toml

# An extra alone, on top of constraints.txt and in step with it.
for extra in gpu head; do
    {
        echo "-c $PWD/constraints.txt"
        "$1" -c 'import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["optional-dependencies"][sys.argv[1]], sep="\n")' "$extra"
    } >"$scratch/$extra.in"
    compile ${2:-} --output-file "constraints-$extra.txt" "$scratch/$extra.in"
done
