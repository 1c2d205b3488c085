#!/bin/sh
# Lock PyTorch, as this machine's package index has it, in step with constraints.txt, and add it to .venv. The lock, build/torch.txt, is also
# what an environment for GPU nodes is built from: ray-gpu env build build/torch.txt
# Not in constraints.txt: which build of PyTorch is wanted (for which CUDA, or for none) is a matter of the machine.
# Usage: scripts/torch.sh [REQUIREMENT]   (default: torch)
set -eu
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
.venv/bin/python -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install -qq --root-user-action=ignore 'pip-tools==7.6.2'
{
    echo "-c $PWD/constraints.txt"
    echo "${1:-torch}"
    .venv/bin/python -c 'from ray_gpu.environment_store import NEEDED
print(*NEEDED, sep="\n")'
} >"$scratch/torch.in"
mkdir -p build
"$scratch/venv/bin/pip-compile" --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
    --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
    --output-file build/torch.txt "$scratch/torch.in"
.venv/bin/python -m pip install -qq --root-user-action=ignore --require-hashes -r build/torch.txt
