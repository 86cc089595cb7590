#!/bin/sh
# Makes the virtual environment in which NVIDIA kvpress 0.5.5 runs: it needs transformers below 5.3, and its package
# bears our package's import name.
#
#   benchmarks/peers/make_environment.sh .venv-peer
#
# PYTHON       the interpreter, 3.10 or later
# TORCH_FLAGS  extra flags of the pip call that installs torch, for example for the CPU build:
#              TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
set -eu
if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3.11}" -m venv "$1"
# shellcheck disable=SC2086  # flags are words
"$1/bin/pip" install --quiet ${TORCH_FLAGS:-} -r "$here/../../requirements/torch.txt"
"$1/bin/pip" install --quiet --no-deps -r "$here/requirements.txt"
"$1/bin/python" -c "import kvpress, torch, transformers; print('kvpress 0.5.5 with transformers', transformers.__version__, 'and torch', torch.__version__)"
