# shellcheck shell=bash
# What the launchers share; sourced by them, from the repository's root.

fail() {
  echo "error: $*" >&2
  exit 2
}

quote() { # the words on one line, as a shell reads them back; in single quotes where that suffices
  local word line=""
  for word; do
    case "$word" in
      *\'* | *[[:cntrl:]]*) printf -v word %q "$word" ;;
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'$word'" ;;
    esac
    line+=" $word"
  done
  echo "${line# }"
}

# Temporary files go to a private folder with an unpredictable name.
# shellcheck disable=SC2016,SC2034 # expanded and used by the others
TEMPORARY='mktemp -d "${TMPDIR:-/tmp}/esolm_jax.XXXXXXXXXX"'

check_verb() { # VERB: one of the modules that are commands
  local verbs
  verbs=$(grep -l '^if __name__' esolm_jax/*.py | sed 's|.*/||; s|\.py$||' | paste -sd ' ' -)
  [[ " $verbs " == *" $1 "* ]] || fail "VERB=$1: must be one of $verbs"
}

check_shared_workdir() { # args …: --workdir must be among them, a folder that all hosts can see
  local arg workdir="" previous=""
  for arg; do
    case "$previous" in --workdir | -workdir) workdir=$arg ;; esac
    case "$arg" in --workdir=* | -workdir=*) workdir=${arg#*=} ;; esac
    previous=$arg
  done
  [[ $workdir == /* ]] \
    || fail "--workdir=$workdir: must be a folder /… mounted on all hosts, as Cloud Storage FUSE does"
}
