#!/usr/bin/env bash
# A training run on a Cloud TPU slice, from any machine with gcloud.
#
#   launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [--project=PROJECT] [--dry_run] ...
#
#   create --type=v5litepod-16 --version=v2-alpha-tpuv5-lite [--spot=yes]   ask for it, wait for it
#   setup --repo=URL [--ref=BRANCH]        clone and install on every worker
#   run -- python -m ppflow_jax.main ...   start on every worker, in the background
#   tail                                   follow the output of worker 0
#   stop                                   SIGTERM: the run saves its step and ends with code 75
#   status                                 state of the slice; exit codes by worker
#   delete                                 give the slice back
#   keep (flags of all) -- COMMAND         create, setup, run; again after every preemption
#
# --workdir of the command must be on storage that every worker sees and that outlives them
# (Filestore or NFS). Flags may come from PPFLOW_NAME, PPFLOW_ZONE, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"

(($#)) || fail "give an action: create, setup, run, tail, stop, status, delete or keep"
action=$1
shift
parse "name zone project type version spot repo ref poll" "$@"
need name zone
need_tool gcloud
where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi
poll=${poll:-60}
folder=ppflow_jax # on the workers

on_workers() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

state() { # of the slice; empty if there is none
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

create() {
  need type version
  local options=(--accelerator-type="$type" --runtime-version="$version")
  if [[ -n $spot ]]; then options+=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    "${options[@]}"
  if $dry_run; then
    echo "# wait until gcloud compute tpus queued-resources describe says ACTIVE"
    return
  fi
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in FAILED | SUSPENDED) fail "the slice is $now: $me delete, then create" ;; esac
    echo "$me: $name is ${now:-not there yet}"
    sleep "$poll"
  done
}

setup() {
  need repo
  local clone
  clone=$(printf 'git clone --quiet %q %q' "$repo" "$folder")
  if [[ -n $ref ]]; then clone+=$(printf ' --branch %q' "$ref"); fi
  on_workers all "set -e; [ -d $folder ] || $clone; cd $folder; python3 -m venv .venv; \
.venv/bin/pip install --quiet -e '.[tpu]'"
}

start() {
  need_command
  local inner
  # The exit code is kept in a file: ssh is gone by then.
  inner="$(printf '%q ' "${command[@]}")& echo \$! > run.pid; wait \$!; echo \$? > exit_code"
  on_workers all "cd $folder; if [ -f run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then \
echo already running >&2; exit 1; fi; rm -f exit_code; export PATH=\$PWD/.venv/bin:\$PATH; \
$(printf 'setsid nohup bash -c %q' "$inner") >> run.log 2>&1 < /dev/null & sleep 1"
}

exit_codes() { # a line for each worker: its exit code, or "running"
  on_workers all "cat $folder/exit_code 2>/dev/null || echo running"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

keep() {
  need type version repo
  need_command
  if $dry_run; then
    create
    setup
    start
    echo "# every $poll s: all exit codes 0: end; 1 or 2: stop; 75 or killed: run again;"
    echo "# the slice preempted: delete, create, setup, run again"
    return
  fi
  local codes
  while true; do
    case $(state) in
      ACTIVE) ;;
      "")
        create
        setup
        start
        ;;
      FAILED | SUSPENDED | SUSPENDING) # preempted
        delete
        continue
        ;;
    esac
    sleep "$poll"
    codes=$(exit_codes) || continue # unreachable: preempted, as the state will say
    if [[ $codes == *running* ]]; then continue; fi
    if ! grep -qvx 0 <<<"$codes"; then
      echo "$me: done"
      return
    fi
    if grep -qx '[12]' <<<"$codes"; then fail "the run failed: $me tail says why"; fi
    echo "$me: ended with $(tr '\n' ' ' <<<"$codes"), again"
    start
  done
}

case $action in
  create) create ;;
  setup) setup ;;
  run) start ;;
  tail) on_workers 0 "tail -n 50 -F $folder/run.log" ;;
  stop) on_workers all "kill -TERM \$(cat $folder/run.pid)" ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format='value(state.state)'
    exit_codes
    ;;
  delete) delete ;;
  keep) keep ;;
  *) fail "unknown action '$action': create, setup, run, tail, stop, status, delete or keep" ;;
esac
