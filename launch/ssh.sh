#!/usr/bin/env bash
# A training run on the GPUs of several machines that are reached by ssh; restarted when it ends.
#
#   launch/ssh.sh ACTION --hosts=a,b,c [--dir=ppflow_jax] [--name=run] [--dry_run] ...
#
#   setup --repo=URL [--ref=BRANCH] [--python=...]    clone and install on every host
#   run [--gpus=8] [--port=8476] -- ppflow train ...  start on every host, in the background
#   keep (flags of run) [--restarts=100] -- COMMAND   run, again after stops and crashes, to its end;
#                                                     with --repo, setup first. Also without ACTION
#   tail                                              follow the output of the first host
#   stop                                              SIGTERM: the run saves its step, ends with 75
#   status                                            exit codes by host
#
# The first host coordinates: the others must reach it by its name at --port. DIR (from the home
# folder) is where the command runs and keeps NAME.K.log, with .venv/bin first in PATH. Workdirs must
# be on storage that every host sees. --python: file or name of a Python 3.11 or newer on the hosts,
# or `install`. --ssh="ssh -p 2222 -i KEY": how to call ssh. Flags may come from PPFLOW_HOSTS, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"
# shellcheck source=launch/hosts.sh
source "$(dirname "$0")/hosts.sh"

action=keep
if [[ ${1:-} != --* ]]; then
  action=${1:-}
  shift || fail "give an action: setup, run, keep, tail, stop or status"
fi
parse "hosts gpus dir name port repo ref python ssh poll restarts" "$@"
need hosts
IFS=, read -ra hosts <<<"$hosts"
for host in "${hosts[@]}"; do
  [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ ]] || fail "--hosts: '$host' is no name: write a,b or user@a"
done
read -ra ssh <<<"${ssh:-ssh -o BatchMode=yes -o ConnectTimeout=10}"
folder=${dir:-ppflow_jax}
name=${name:-run}
port=${port:-8476}
poll=${poll:-60}
restarts=${restarts:-100}
numbers port restarts
[[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || fail "--name=$name: letters, digits, _ . -"
need_tool "${ssh[0]}"

on_workers() { # WORKER TEXT
  local k
  if $dry_run && [[ $1 == all ]]; then
    echo "for host in ${hosts[*]}; do"
    echo "  $(quote "${ssh[@]}") \"\$host\" $(quote "$2")"
    echo "done"
    return
  fi
  for k in "${!hosts[@]}"; do
    if [[ $1 == all || $1 == "$k" ]]; then run "${ssh[@]}" "${hosts[k]}" "$2"; fi
  done
}

worker() { # WORKER WORD...: launch/worker.sh goes there by standard input
  local script text k=$1
  script=$(dirname "$0")/worker.sh
  shift
  text="cd $(quote "$folder") && export PATH=\"\$PWD/.venv/bin:\$PATH\""
  if [[ $1 == start ]]; then text+=" $(environment "$k")"; fi
  text+=" &&
bash -s $(quote "$@")"
  if $dry_run; then
    echo "$(show "${ssh[@]}" "${hosts[k]}" "$text") < $(quote "$script")"
  else
    "${ssh[@]}" "${hosts[k]}" "$text" <"$script"
  fi
}

environment() { # WORKER: how the processes find each other; one alone need not
  local set=()
  if ((${#hosts[@]} > 1)); then
    set+=("JAX_COORDINATOR_ADDRESS=${hosts[0]#*@}:$port" "JAX_NUM_PROCESSES=${#hosts[@]}")
    set+=("JAX_PROCESS_ID=$1")
  fi
  if [[ -n $gpus ]]; then set+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))"); fi
  quote "${set[@]}"
}

each() { # ACTION: on every host; those that fail have said why
  local k failed=0
  for k in "${!hosts[@]}"; do worker "$k" "$1" "$name.$k" || failed=$?; done
  return "$failed"
}

codes() { # a line for each host
  local k
  for k in "${!hosts[@]}"; do worker "$k" code "$name.$k" || echo "unreachable"; done
}

start() { # on all hosts or on none
  local k one
  for k in "${!hosts[@]}"; do
    worker "$k" start "$name.$k" "${command[@]}" && continue
    for ((one = 0; one < k; one++)); do worker "$one" stop "$name.$one" || true; done
    fail "${hosts[k]}: not started, and so on none"
  done
}

begin() {
  need_command
  if [[ -n $gpus ]]; then numbers gpus; fi
  if ! $dry_run && grep -qx running <<<"$(codes)"; then fail "$name is already running: $me status"; fi
  start
}

keep() {
  need_command
  local found now
  if [[ -n $gpus ]]; then numbers gpus; fi
  if [[ -n $repo ]]; then setup gpu; fi
  if $dry_run; then
    start
    say "every $poll s: all exit codes 0: end; 1 or 2: stop; any other: start again"
    return
  fi
  if [[ $(verdict "$(codes)") != wait ]]; then start; fi
  while true; do
    sleep "$poll"
    found=$(codes)
    now=$(verdict "$found")
    case $now in
      wait) if [[ $found == *unreachable* ]]; then echo "$me: $(paste -sd' ' <<<"$found")"; fi ;;
      ended)
        echo "$me: done"
        return
        ;;
      failed) fail "the run failed ($(paste -sd' ' <<<"$found")): $me tail says why" ;;
      *)
        again "$found"
        start
        ;;
    esac
  done
}

case $action in
  setup) setup gpu ;;
  run) begin ;;
  keep) keep ;;
  tail) on_workers 0 "tail -n 50 -F $(quote "$folder/$name.0.log")" ;;
  stop) each stop ;;
  status) paste -d' ' <(printf '%s\n' "${hosts[@]}") <(codes) ;;
  *) fail "unknown action '$action': setup, run, keep, tail, stop or status" ;;
esac
