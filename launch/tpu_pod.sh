#!/usr/bin/env bash
# A training run on a Cloud TPU slice up to v6e, from any machine with gcloud.
#
#   launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run] ...
#
#   create --type=v5litepod-16 --version=v2-alpha-tpuv5-lite [--spot=yes]   ask for it, wait for it
#   setup --repo=URL [--ref=BRANCH] [--python=...]   clone and install on every worker
#   run -- python -m ppflow_jax.main ...   start on every worker, in the background
#   tail                                   follow the output of worker 0
#   stop                                   SIGTERM: the run saves its step and ends with code 75
#   status                                 state of the slice; exit codes by worker
#   delete                                 give the slice back
#   keep (flags of all) [--restarts=100] -- COMMAND  create, setup, run; again after every preemption
#
# The Cloud TPU API, which this uses, is no longer developed and has no TPU7x: for that and for new
# projects there is launch/gke_tpu.sh.
# --workdir of the command must be on storage that every worker sees and that outlives them
# (gs://, Filestore or NFS). --python: file or name of a Python 3.11 or newer on the workers, or
# `install`, which installs one there with uv. Flags may come from PPFLOW_NAME, PPFLOW_ZONE, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"
# shellcheck source=launch/hosts.sh
source "$(dirname "$0")/hosts.sh"

(($#)) || fail "give an action: create, setup, run, tail, stop, status, delete or keep"
action=$1
shift
parse "name zone project type version spot repo ref python poll restarts" "$@"
need name zone
need_tool gcloud
where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi
poll=${poll:-60}
restarts=${restarts:-100}
numbers restarts
folder=ppflow_jax

on_workers() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

state() { # of the slice; empty if there is none
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

# launch/worker.sh of the clone, with its Python
worker() { # WORKER WORD...
  local k=$1
  shift
  on_workers "$k" "cd $folder && PATH=\$PWD/.venv/bin:\$PATH \\
launch/worker.sh $(quote "$@")"
}

known_type() {
  need type version
  # docs.cloud.google.com/tpu/docs/tpu7x-training: GKE, XPK or Cluster Director only
  [[ $type != *7x* && $type != v[7-9]* ]] || fail \
    "--type=$type: the Cloud TPU API ends at v6e: launch/gke_tpu.sh starts runs on TPU7x"
}

create() {
  known_type
  local options=(--accelerator-type="$type" --runtime-version="$version")
  if [[ -n $spot ]]; then options+=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    "${options[@]}"
  if $dry_run; then
    say "wait until gcloud compute tpus queued-resources describe says ACTIVE"
    return
  fi
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in FAILED | SUSPENDED) fail "the slice is $now: $me delete, then create" ;; esac
    echo "$me: $name is ${now:-not there yet}"
    sleep "$poll"
  done
}

start() {
  need_command
  worker all start run "${command[@]}"
}

codes() { worker all code run; } # a line for each worker

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

keep() {
  need repo
  known_type
  need_command
  if $dry_run; then
    create
    setup tpu
    start
    say "every $poll s: all exit codes 0: end; 1 or 2: stop; any other: start again;"
    say "the slice preempted: delete, create, setup, start again"
    return
  fi
  local found begun=false now # begun: started here, on the slice that is there
  while true; do
    now=$(state)
    case $now in
      ACTIVE) ;;
      "") create ;;
      FAILED | SUSPENDED | SUSPENDING) # preempted
        delete
        begun=false
        continue
        ;;
      *)
        echo "$me: $name is $now"
        sleep "$poll"
        continue
        ;;
    esac
    if ! $begun; then
      begun=true
      # found running after this script was interrupted
      if found=$(codes 2>/dev/null) && [[ $(verdict "$found") == wait ]]; then continue; fi
      setup tpu
      start
    fi
    sleep "$poll"
    found=$(codes) || continue # unreachable: preempted, as the state will say
    case $(verdict "$found") in
      wait) ;;
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
  create) create ;;
  setup) setup tpu ;;
  run) start ;;
  tail) on_workers 0 "tail -n 50 -F $folder/run.log" ;;
  stop) worker all stop run ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)'
    codes
    ;;
  delete) delete ;;
  keep) keep ;;
  *) fail "unknown action '$action': create, setup, run, tail, stop, status, delete or keep" ;;
esac
