#!/usr/bin/env bash
# Runs one verb on TPU slices of a GKE cluster, as a workload of xpk (pip install xpk).
#   bash launch/xpk.sh [--dry-run] --cluster=C --tpu-type=TYPE --image=IMAGE [options] -- VERB args …
#   bash launch/xpk.sh --cluster=c --tpu-type=v5litepod-256 --image=gcr.io/p/esolm_jax \
#     -- train --config=configs/text.py --workdir=/mnt/bucket/run
# IMAGE is built from this checkout:  docker build --tag=gcr.io/p/esolm_jax .   (see Dockerfile)
#   --num-slices=N      number of slices (1)
#   --project=PROJECT   --zone=ZONE   of gcloud (its defaults)
#   --name=NAME         of the workload (esolm-VERB-month-day-time)
#   --max-restarts=N    after a loss of hosts; training resumes from its checkpoint (10)
#   --extra=ARG         one more argument for xpk, e.g. --extra=--spot; may be repeated
#   --dry-run           prints the commands and runs nothing
# The workdir must be a folder mounted on all hosts, such as a bucket by Cloud Storage FUSE.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

dry="" cluster="" type="" image="" slices=1 name="" restarts=10 options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  value="${1#*=}"
  case "$1" in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/xpk.sh; exit ;;
    --dry-run) dry=yes ;;
    --cluster=?*) cluster=$value ;;
    --tpu-type=?*) type=$value ;;
    --image=?*) image=$value ;;
    --name=?*) name=$value ;;
    --num-slices=*)
      [[ $value =~ ^[1-9][0-9]*$ ]] || fail "$1: must be a whole number from 1 up"
      slices=$value ;;
    --max-restarts=*)
      [[ $value =~ ^[0-9]+$ ]] || fail "$1: must be a whole number from 0 up"
      restarts=$value ;;
    --project=?* | --zone=?*) options+=("$1") ;;
    --extra=?*) options+=("$value") ;;
    *) fail "$1: must be a known option with a value; see --help (VERB and its arguments come after --)" ;;
  esac
  shift
done
[ "$cluster" ] || fail "--cluster is missing: the name of the GKE cluster"
[ "$type" ] || fail "--tpu-type is missing: the type of a slice, e.g. --tpu-type=v5litepod-256"
[ "$image" ] || fail "--image is missing: the Docker image with this project"
[ $# -ge 2 ] || fail "-- VERB is missing: what to run, e.g. -- train --config=…"
verb=$2
shift 2
check_verb "$verb"
name="${name:-esolm-$verb-$(date +%m%d-%H%M%S)}"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] \
  || fail "--name=$name: must be up to 40 of a-z, 0-9 and -, from a letter to a letter or digit"

check_shared_workdir "$@"

# `exec`, so that SIGTERM reaches Python itself. Kubernetes reads $$ as $ (and $(NAME) as a variable).
printf -v words ' %q' python -m "esolm_jax.$verb" "$@"
command="exec${words//\$/\$\$}"
create=(xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$type"
  "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts"
  --termination-grace-period-seconds=300 ${options[@]+"${options[@]}"} "--command=$command")

if [ "$dry" ]; then
  quote "${create[@]}"
else
  command -v xpk >/dev/null || fail "xpk: not found; pip install xpk"
  "${create[@]}"
fi
