# shellcheck shell=bash
# Functions of all launchers, which source this file from the repository's root.

fail() {
  echo "error: $*" >&2
  exit 2
}

quote() { # prints the words on one line, quoted for a shell
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
# shellcheck disable=SC2016,SC2034 # expanded and used by the launchers
TEMPORARY='mktemp -d "${TMPDIR:-/tmp}/esolm_jax.XXXXXXXXXX"'

check_verb() { # VERB: one of the modules that are commands
  local verbs
  verbs=$(grep -l '^if __name__' esolm_jax/*.py esolm_jax/*/__main__.py \
    | sed 's|/__main__\.py$||; s|.*/||; s|\.py$||' | paste -sd ' ' -)
  [[ " $verbs " == *" $1 "* ]] || fail "VERB=$1: must be one of $verbs"
}

check_shared_workdir() { # args …: --workdir must name a folder that all hosts can see
  local arg workdir="" previous=""
  for arg; do
    case "$previous" in --workdir | -workdir) workdir=$arg ;; esac
    case "$arg" in
      --workdir=* | -workdir=*) workdir=${arg#*=} ;;
      workdir=*) workdir=${arg#*=} workdir=${workdir%%,*} ;; # of harness, in --model_args
    esac
    previous=$arg
  done
  [[ $workdir == /* ]] \
    || fail "--workdir=$workdir: must be an absolute path mounted on all hosts, such as by Cloud Storage FUSE"
}
