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

# quote WORD...: as any POSIX shell reads them.
quote() {
  local word flag out="" apostrophe="'\\''"
  for word in "$@"; do
    flag=""
    if [[ $word =~ ^--[A-Za-z0-9_.-]+= ]]; then flag=${BASH_REMATCH[0]}; fi
    word=${word#"$flag"}
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$apostrophe}'"
    out+="${out:+ }$flag$word"
  done
  printf '%s' "$out"
}

# show WORD...: a command that can be pasted, on lines of about 100 characters.
show() {
  local word line="" text=""
  for word in "$@"; do
    word=$(quote "$word")
    if [[ -z $line ]]; then
      line=$word
    elif ((${#line} + ${#word} > 96)) || [[ $word == *$'\n'* ]]; then
      text+="$line \\"$'\n'
      line="    $word"
    else
      line+=" $word"
    fi
  done
  printf '%s\n' "$text$line"
}

# Run a command, or with --dry_run print it.
run() {
  if $dry_run; then show "$@"; else "$@"; fi
}

# say TEXT: what --dry_run cannot show as a command.
say() {
  if $dry_run; then echo "# $*"; fi
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

# numbers FLAG...: stop if one is not a whole number from 1 on.
numbers() {
  local flag
  for flag in "$@"; do
    [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag=${!flag}: write a whole number, 1 or more"
  done
}

# json WORD...: a JSON list, which YAML reads, goes to $json; $(NAME), which Kubernetes would fill
# in, is escaped.
json() {
  local word out=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//\$(/\$\$(}
    [[ $word != *[[:cntrl:]]* ]] || fail "the command has a control character: $(printf '%q' "$word")"
    out+="${out:+, }\"$word\""
  done
  # shellcheck disable=SC2034 # of the scripts
  json="[$out]"
}

# fill_in FILE NAME VALUE ...: its text with ${NAME} replaced goes to $manifest.
fill_in() {
  manifest=$(<"$1")
  shift
  while (($#)); do
    manifest=${manifest//"\${$1}"/"$2"}
    shift 2
  done
}

# apply MANIFEST: hand it to kubectl, or with --dry_run print it.
apply() {
  if $dry_run; then
    echo "# for: kubectl apply -f -"
    echo "$1"
  else
    kubectl apply -f - <<<"$1"
  fi
}

need_tool() {
  $dry_run || type -P "$1" >/dev/null || fail "$1 is not installed here"
}
