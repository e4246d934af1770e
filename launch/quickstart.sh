#!/usr/bin/env bash
# Prepares Shakespeare, trains a small Eso-LM (B), evaluates it, samples from it.
#   bash launch/quickstart.sh [--config.field=value …]      (WORKDIR=runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
source launch/install.sh ""
workdir="${WORKDIR:-runs/quickstart}"
begin=$SECONDS

verb() {
  echo
  echo "== $* =="
  "$bin/python" -m "esolm_jax.$1" "${@:2}"
}

verb prepare --config=configs/shakespeare.py --workdir="$workdir" "$@"
verb train --config=configs/shakespeare.py --workdir="$workdir" "$@"
verb evaluate --workdir="$workdir" "$@"
verb sample --workdir="$workdir" "$@"

echo
echo "done in $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s."
echo "  perplexity      $workdir/evaluate.json"
echo "  texts           $workdir/samples.jsonl"
echo "  learning curve  $workdir/learning_curve.png"
