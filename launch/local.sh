#!/usr/bin/env bash
# Runs one verb in several processes on this machine, each with simulated CPU devices.
#   bash launch/local.sh [--dry-run] PROCESSES DEVICES VERB [args …]
#   bash launch/local.sh 2 4 train --config=configs/shakespeare.py --workdir=runs/two
# Process 0 prints here, process I into $LOGS/I.log. Paths are relative to the repository's root.
# Ctrl-C and SIGTERM reach every process. The exit code is that of the first process that failed.
# --dry-run prints the commands and runs nothing. Environment:
#   PYTHON  an interpreter with the project installed (default: .venv, created if missing)
#   PORT    port of the coordinator (default: a free one)
#   LOGS    folder of the logs, owned by you (default: a new private one in $TMPDIR)
#   GRACE   seconds for the other processes to end after one failed (default: 60)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

free_port() { # below 32768, where Linux's outgoing connections begin
  local port
  while port=$((20000 + RANDOM % 12000)); (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

dry=
case "${1:-}" in
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' launch/local.sh; exit ;;
  --dry-run) dry=yes; shift ;;
esac
[ $# -ge 3 ] || fail "${*:-no arguments}: must be PROCESSES DEVICES VERB [args …]; see --help"
processes=$1 devices=$2 verb=$3
shift 3
grace="${GRACE:-60}" port="${PORT:-$(free_port)}"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$processes: must be a whole number from 1 up"
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "DEVICES=$devices: must be a whole number from 1 up"
[[ $grace =~ ^[0-9]+$ ]] || fail "GRACE=$grace: must be a whole number of seconds"
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -lt 65536 ]] || fail "PORT=$port: must be in 1 to 65535"
check_verb "$verb"
logs="${LOGS:-}"

command_of() { # sets `command`: that of process $1, followed by the arguments
  command=(env "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes"
    "JAX_PROCESS_ID=$1" "JAX_NUM_CPU_DEVICES=$devices" JAX_PLATFORMS=cpu
    "${PYTHON:-.venv/bin/python}" -m "esolm_jax.$verb" "${@:2}")
}

if [ "$dry" ]; then
  [ "$logs" ] || echo "logs=\$($TEMPORARY)"
  for ((i = processes - 1; i > 0; i--)); do
    command_of "$i" "$@"
    log="\"\$logs/$i.log\""
    [ -z "$logs" ] || log=$(quote "$logs/$i.log")
    echo "$(quote "${command[@]}") </dev/null >$log 2>&1 &"
  done
  command_of 0 "$@"
  echo "$(quote "${command[@]}") </dev/null"
  exit
fi

if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: no such program"
else
  JAX_PLATFORMS=cpu source launch/install.sh ""
fi
[ "$logs" ] || logs=$(eval "$TEMPORARY") || fail "TMPDIR=${TMPDIR:-}: must be a folder that can be written to"
mkdir -p "$logs" || fail "LOGS=$logs: must be a folder that can be written to"
[ -O "$logs" ] || fail "LOGS=$logs: must be owned by you, because its owner can plant links"
[ "$processes" = 1 ] || echo "logs of processes 1 to $((processes - 1)): $logs/I.log"

pids=() first_code=0 deadline="" stopping=""
end_all() { # every process, and what it has started
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}
trap end_all EXIT

set -m # a group for each: the terminal's Ctrl-C reaches this script alone, which passes it on
for ((i = 0; i < processes; i++)); do
  command_of "$i" "$@"
  if [ "$i" = 0 ]; then
    "${command[@]}" </dev/null &
  else
    rm -f -- "$logs/$i.log" # of an earlier run; -C: follow no planted link
    (set -C && exec "${command[@]}" </dev/null >"$logs/$i.log" 2>&1) &
  fi
  pids[i]=$!
done
set +m
for signal in INT TERM; do
  # shellcheck disable=SC2064 # $signal is this one
  trap "stopping=yes; kill -$signal "'${pids[@]+"${pids[@]}"} 2>/dev/null || true' "$signal"
done

ended() { # process $1: what its exit code means for the others
  local code=0
  wait "${pids[$1]}" 2>/dev/null || code=$?
  unset "pids[$1]"
  [ "$code" != 0 ] || return 0
  [ "$first_code" != 0 ] || first_code=$code deadline=$((SECONDS + grace))
  [ -z "$stopping" ] || return 0
  echo "process $1 of $processes ended with code $code" >&2
  [ "$1" = 0 ] || { echo "the end of $logs/$1.log:" && tail -n 20 "$logs/$1.log"; } >&2
}

while [ ${#pids[@]} -gt 0 ]; do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null || ended "$i"
  done
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ ${#pids[@]} -gt 0 ]; then
    echo "killing process(es) ${!pids[*]}: still running $grace s after the first failure" >&2
    end_all
    break
  fi
  sleep 0.2 || true # a signal may cut it short
done
exit "$first_code"
