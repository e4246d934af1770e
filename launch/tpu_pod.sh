#!/usr/bin/env bash
# Runs one verb on all hosts of a TPU pod: copies HEAD of this checkout, installs it, runs it.
#   bash launch/tpu_pod.sh [--dry-run] --name=POD --zone=ZONE [options] -- VERB args …
#   bash launch/tpu_pod.sh --name=pod --zone=us-west4-a --create --type=v5litepod-256 \
#     --version=v2-alpha-tpuv5-lite -- train --config=configs/text.py --workdir=/mnt/bucket/run
# The run survives a lost connection and writes to ~/esolm_jax/VERB.log on each host. The same command
# resumes it. To stop it with a checkpoint:
#   gcloud compute tpus tpu-vm ssh POD --zone=ZONE --worker=all --command='pkill -TERM -f [e]solm_jax.train'
#   --project=PROJECT   of gcloud (its default)
#   --create            creates the pod first; needs --type=TYPE and --version=SOFTWARE
#   --extra=ARG         one more argument for its creation, e.g. --extra=--spot; may be repeated
#   --dry-run           prints the commands and runs nothing
# The workdir must be a folder mounted on all hosts, such as a bucket by Cloud Storage FUSE.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

dry="" name="" zone="" create="" type="" version="" where=() options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  value="${1#*=}"
  case "$1" in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/tpu_pod.sh; exit ;;
    --dry-run) dry=yes ;;
    --create) create=yes ;;
    --name=?*) name=$value ;;
    --zone=?*) zone=$value where+=("$1") ;;
    --project=?*) where+=("$1") ;;
    --type=?*) type=$value ;;
    --version=?*) version=$value ;;
    --extra=?*) options+=("$value") ;;
    *) fail "$1: must be a known option with a value; see --help (VERB and its arguments come after --)" ;;
  esac
  shift
done
[ "$name" ] || fail "--name is missing: the pod's name"
[ "$zone" ] || fail "--zone is missing: the pod's zone, e.g. --zone=us-west4-a"
if [ "$create" ]; then
  [ "$type" ] || fail "--type is missing: what to create, e.g. --type=v5litepod-256"
  [ "$version" ] || fail "--version is missing: its software, e.g. --version=v2-alpha-tpuv5-lite"
else
  [ -z "$type$version${options[*]-}" ] || fail "--type, --version, --extra: must be used with --create"
fi
[ $# -ge 2 ] || fail "-- VERB is missing: what to run, e.g. -- train --config=…"
verb=$2
shift 2
check_verb "$verb"

check_shared_workdir "$@"

commit=$(git rev-parse --short HEAD 2>/dev/null) || fail "$PWD: must be a git checkout, because HEAD is copied"
git diff --quiet HEAD || echo "warning: uncommitted changes are not copied; HEAD is $commit" >&2
[ "$dry" ] || command -v gcloud >/dev/null || fail "gcloud: not found; install the Google Cloud CLI"

run() { # or print; $folder stays for the shell to expand
  if [ "$dry" ]; then quote "$@" | sed "s|'\([^']*\)\$folder/\([^']*\)'|\"\1\$folder/\2\"|"; else "$@"; fi
}
vm=(gcloud compute tpus tpu-vm)

# Many images have only Python 3.10; install 3.11, after waiting for the lock of apt.
install="set -e; python3 -c \"import sys; sys.exit(sys.version_info < (3, 11))\" || \
command -v python3.11 || { sudo apt-get -qq update; \
sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install python3.11-venv; }; \
tar -xzf esolm_jax.tar.gz; cd esolm_jax; source launch/install.sh tpu"

# Runs in the background, so that a lost connection does not end it.
printf -v words '%q ' .venv/bin/python -m "esolm_jax.$verb" "$@"
start="cd esolm_jax || exit; log=$verb.log; date >>\$log; nohup env ESOLM_CLUSTER=1 $words>>\$log 2>&1 </dev/null & \
tail -n 1 -f --pid=\$! \$log; wait \$!"

if [ "$dry" ]; then
  # shellcheck disable=SC2016 # printed unexpanded
  folder='$folder'
  echo "folder=\$($TEMPORARY)"
else
  folder=$(eval "$TEMPORARY") || fail "TMPDIR=${TMPDIR:-}: must be a folder that can be written to"
  trap 'rm -rf "$folder"' EXIT
fi
archive="$folder/esolm_jax-$commit.tar.gz"

[ -z "$create" ] || run "${vm[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" \
  "--version=$version" ${options[@]+"${options[@]}"}
run git archive --format=tar.gz --prefix=esolm_jax/ "--output=$archive" HEAD
run "${vm[@]}" scp "$archive" "$name:esolm_jax.tar.gz" "${where[@]}" --worker=all
run "${vm[@]}" ssh "$name" "${where[@]}" --worker=all "--command=$install"
run "${vm[@]}" ssh "$name" "${where[@]}" --worker=all "--command=$start"
