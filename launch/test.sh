#!/usr/bin/env bash
# Checks format, lint, import layers and types, then runs the tests, on the CPU.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export JAX_PLATFORMS=cpu
source launch/install.sh test
"$bin"/ruff check .
"$bin"/ruff format --check .
"$bin"/lint-imports
"$bin"/mypy
# A file stays on one worker, to share its fixtures; the order is that of tests/conftest.py.
"$bin"/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
