#!/usr/bin/env bash
# Four algorithms, three seeds: every figure of this folder's README. About 20 minutes on two cores.
#     experiments/fedavg_fmnist/compare.sh [OUT] [key=value ...]
set -euo pipefail
out="${1:-runs/fedavg_fmnist}"
shift || true
config="$(dirname "$0")/run.yaml"

run() { # name, then the options that make it
  local name="$1"
  shift
  for seed in 0 1 2; do
    fedray run "$config" "seed=$seed" "$@" --out "$out/$name-$seed"
  done
}

run fedavg "$@"
run fedprox algorithm.name=fedprox algorithm.mu=0.01 "$@"
run fedadam algorithm.name=fedadam algorithm.server_lr=0.003 "$@"
run scaffold algorithm.name=scaffold algorithm.local_lr=0.03 "$@" # at 0.1 it diverges: see the README
fedray report "$out"/*-? --out "$out/report.html" --target 0.75 --target 0.8
