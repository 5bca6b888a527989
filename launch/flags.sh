# shellcheck shell=bash
# What the launch scripts share; sourced, never run.
set -Eeuo pipefail

me=$(basename "$0")
for argument in "$@"; do # those of the script
  case $argument in
    --) break ;;
    --help | -h) # its first comment
      sed -n '2,/^[^#]/{/^# shellcheck/d;/^[^#]/d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
  esac
done
dry_run=false
command=() # what stands after --

fail() {
  echo "$me: $*" >&2
  exit 2
}

stopped() { # EXIT_CODE COMMAND
  echo "$me: stopped, exit code $1: $2" >&2
  exit "$1"
}

trap 'stopped $? "$BASH_COMMAND"' ERR

# Run a command, or with --dry_run print it so that it could be pasted.
run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# parse "FLAG ..." ARGUMENT...: --flag=value sets $flag for the flags named, whose values may also
# come from the environment variables PPFLOW_FLAG; all that follows -- goes to $command.
parse() {
  local allowed=" $1 " flag from
  for flag in $1; do
    from=PPFLOW_${flag^^}
    printf -v "$flag" '%s' "${!from:-}"
  done
  shift
  while (($#)); do
    case $1 in
      --dry_run) dry_run=true ;;
      --)
        shift
        command=("$@")
        return
        ;;
      --*=*)
        flag=${1%%=*}
        flag=${flag#--}
        [[ $allowed == *" $flag "* ]] || fail "unknown flag --$flag; there are:$allowed--dry_run"
        printf -v "$flag" '%s' "${1#*=}"
        ;;
      *) fail "unexpected argument '$1': flags are written --name=value, the command after --" ;;
    esac
    shift
  done
}

# need FLAG...: stop if one has no value.
need() {
  local flag
  for flag in "$@"; do
    [[ -n ${!flag} ]] || fail "--$flag=... (or PPFLOW_${flag^^} in the environment) is required"
  done
}

need_command() {
  ((${#command[@]})) || fail "give the command after --, e.g. -- python -m ppflow_jax.main ..."
}

need_tool() {
  $dry_run || type -P "$1" >/dev/null || fail "$1 is not installed here"
}
