#!/usr/bin/env bash
# Checks format, lint, import layers and types, then runs the tests, on the CPU.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh test
export JAX_PLATFORMS=cpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
.venv/bin/mypy
# Files stay on one worker, to share their fixtures, until a worker is idle.
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
