#!/usr/bin/env bash
# Submits one verb to SLURM: one process per GPU, or one per node without GPUs.
#   bash launch/slurm.sh [--dry-run] --nodes=N [options] -- VERB args …
#   bash launch/slurm.sh --nodes=4 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00 \
#     -- train --config=configs/shakespeare.py --workdir=/shared/runs/one
# Before the time limit, training saves a checkpoint; the job is requeued and resumes.
# All nodes must see the workdir, and without --image this checkout and its .venv. To make .venv on a
# login node without GPUs:  bash launch/install.sh cuda12
#   --gpus-per-node=G   --cpus-per-task=C   --time=[DAYS-]HOURS:MINUTES:SECONDS
#   --partition=NAME    --account=NAME      --name=NAME (esolm-VERB)
#   --stop-ahead=S      seconds between SIGTERM and the time limit (300)
#   --extra=ARG         one more argument for sbatch, e.g. --extra=--qos=long; may be repeated
#   --image=IMAGE       runs in a container of this image (see Dockerfile), with pyxis
#   --mounts=A:B[,C:D]  folders of the nodes that the container sees, e.g. that of the workdir
#   --dry-run           prints the commands and runs nothing
# Environment: PYTHON, an interpreter with the project installed (default: .venv/bin/python,
# or python of the image).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

number() { # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--$1=$2: must be a whole number from 1 up"
}

dry="" nodes="" gpus="" cpus="" name="" ahead=300 image="" mounts="" options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  value="${1#*=}"
  case "$1" in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/slurm.sh; exit ;;
    --dry-run) dry=yes ;;
    --nodes=*) number nodes "$value"; nodes=$value ;;
    --gpus-per-node=*) number gpus-per-node "$value"; gpus=$value ;;
    --cpus-per-task=*) number cpus-per-task "$value"; cpus=$value ;;
    --stop-ahead=*) number stop-ahead "$value"; ahead=$value ;;
    --time=*)
      [[ $value =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || fail "$1: must look like 24:00:00 or 2-00:00:00"
      options+=("$1") ;;
    --partition=?* | --account=?*) options+=("$1") ;;
    --name=?*) name=$value ;;
    --image=?*) image=$value ;;
    --mounts=?*) mounts=$value ;;
    --extra=?*) options+=("$value") ;;
    *) fail "$1: must be a known option with a value; see --help (VERB and its arguments come after --)" ;;
  esac
  shift
done
[ "$nodes" ] || fail "--nodes is missing: how many nodes to run on"
[ "$image" ] || [ -z "$mounts" ] || fail "--mounts=$mounts: must be used with --image"
[ $# -ge 2 ] || fail "-- VERB is missing: what to run, e.g. -- train --config=…"
verb=$2
shift 2
check_verb "$verb"
[ -z "$image" ] || check_shared_workdir "$@"

python="${PYTHON:-$PWD/.venv/bin/python}"
[ -z "$image" ] || python="${PYTHON:-python}"
if [ ! "$dry" ]; then
  command -v sbatch >/dev/null || fail "sbatch: not found; run this on a login node of SLURM"
  [ "$image" ] || command -v "$python" >/dev/null || fail "PYTHON=$python: no such program; see launch/install.sh"
fi

# JAX takes the processes' number, ids and addresses from srun's variables, and gives each process
# the GPU of its number on the node: so each process must see all GPUs of its node.
submit=(sbatch "--job-name=${name:-esolm-$verb}" "--nodes=$nodes" "--ntasks-per-node=${gpus:-1}")
[ -z "$gpus" ] || submit+=("--gpus-per-node=$gpus")
[ -z "$cpus" ] || submit+=("--cpus-per-task=$cpus")
submit+=(--requeue --open-mode=append "--signal=TERM@$ahead" ${options[@]+"${options[@]}"})

# The end of one process must not kill the others, which may still be saving the checkpoint.
step=(srun --kill-on-bad-exit=0 ${cpus:+"--cpus-per-task=$cpus"}
  ${image:+"--container-image=$image"} ${mounts:+"--container-mounts=$mounts"}
  "$python" -m "esolm_jax.$verb" "$@")
script="#!/usr/bin/env bash"
[ "$image" ] || script+="
cd $(quote "$PWD") || exit"
script+="
code=0
$(quote "${step[@]}") || code=\$?"
[ "$verb" != train ] || script+="
# 143: stopped by SIGTERM, with a checkpoint. The same command resumes from it.
[ \"\$code\" != 143 ] || scontrol requeue \"\$SLURM_JOB_ID\""
script+="
exit \"\$code\""

if [ "$dry" ]; then
  printf "%s <<'END'\n%s\nEND\n" "$(quote "${submit[@]}")" "$script"
else
  "${submit[@]}" <<<"$script"
fi
