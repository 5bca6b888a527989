#!/usr/bin/env bash
# Starts and ends a run on one machine of several; launch/tpu_pod.sh and launch/ssh.sh call it there.
#
#   launch/worker.sh start NAME COMMAND ...   in the background; its output goes to NAME.log
#   launch/worker.sh stop NAME                SIGTERM: the run saves its step and ends with code 75
#   launch/worker.sh code NAME                its exit code, or "running", or "none"
#
# On a machine of Google a notice of preemption is passed to the run as SIGTERM at once; the system
# itself would send it late in the 30 s that are left.
set -Eeuo pipefail

fail() {
  echo "worker.sh on $(hostname): $*" >&2
  exit 2
}

# The shell around the run holds a lock: no process id of another program is taken for the run's.
alive() {
  local code=0
  [[ -e $name.lock ]] || return 1
  flock -n -E 9 "$name.lock" true || code=$?
  ((code == 9))
}

# shellcheck disable=SC2329 # this and `notice` are called by a shell of their own
# hold NAME COMMAND...: run it to its end and keep its exit code. It outlives the ssh that began it.
hold() {
  local name=$1 pid watcher code again
  shift
  trap again=true TERM # stopping is up to the command
  "$@" 9>&- &
  pid=$!
  echo "$pid" >"$name.pid"
  notice "$pid" 9>&- &
  watcher=$!
  while true; do
    again=false
    code=0
    wait "$pid" || code=$?
    $again || break
  done
  kill "$watcher" 2>/dev/null || true
  echo "$code" >"$name.code.new"
  mv "$name.code.new" "$name.code"
}

# shellcheck disable=SC2329
# notice PID: SIGTERM to it when the metadata server says that this machine is being preempted.
# docs.cloud.google.com/compute/docs/instances/create-use-spot, "Detect preemption".
notice() {
  local url=${PPFLOW_METADATA:-http://metadata.google.internal/computeMetadata/v1/instance/preempted}
  preempted() { curl -sf -m 5 -H "Metadata-Flavor: Google" "$url" 2>/dev/null; }
  type -P curl >/dev/null && { preempted || { sleep 2 && preempted; }; } >/dev/null || return 0
  until [[ $(preempted) == TRUE ]]; do sleep 1; done
  echo "worker.sh: this machine is being preempted, SIGTERM to the run"
  kill -TERM "$1"
}

start() {
  local code=0 try
  type -P flock >/dev/null || fail "flock (util-linux) is not installed"
  exec 9>>"$name.lock"
  flock -w 1 -E 9 9 || code=$?
  ((code != 9)) || fail "$name is already running"
  ((code == 0)) || fail "the file system of $PWD has no locks: take a local --dir"
  rm -f "$name.code" "$name.pid"
  setsid nohup bash -c "$(declare -f hold notice); hold \"\$@\"" worker.sh "$name" "$@" \
    >>"$name.log" 2>&1 </dev/null &
  for ((try = 0; try < 200; try++)); do
    [[ ! -s $name.pid ]] || return 0
    sleep 0.05
  done
  fail "$name did not start: see $PWD/$name.log"
}

main() {
  local action=${1:-} name=${2:-}
  case $action in
    --help | -h) sed -n '2,/^[^#]/{/^[^#]/d;s/^# \{0,1\}//;p}' "$0" ;;
    start)
      shift 2
      start "$@"
      ;;
    stop)
      if [[ -s $name.code ]] || ! alive; then fail "$name is not running"; fi
      kill -TERM "$(<"$name.pid")"
      ;;
    code)
      if [[ -s $name.code ]]; then
        cat "$name.code"
      elif alive; then
        echo running
      elif [[ -e $name.pid ]]; then
        echo 137 # gone without a word: killed, or the machine was started anew
      else
        echo none
      fi
      ;;
    *) fail "give start, stop or code" ;;
  esac
}

main "$@"
exit
