#!/usr/bin/env bash
# A training run on the GPUs of several Kubernetes nodes; continues after preemption.
#
#   launch/k8s.sh --name=NAME --image=IMAGE --nodes=4 --gpus=8 --claim=VOLUME_CLAIM
#       [--restarts=20] [--grace=300] [--dry_run] -- ppflow train --workdir=/data/runs/b2 ...
#
# IMAGE holds this project, installed; VOLUME_CLAIM (read-write by many) is mounted as /data.
# --grace: seconds from SIGTERM to SIGKILL, for one step and one checkpoint; a spot node may have
# less. --restarts: how often nodes may be lost without a word; stops that saved do not count.
# --dry_run prints the manifest. To stop: kubectl delete job NAME, which saves; the same command
# continues. Flags may come from PPFLOW_NAME, PPFLOW_IMAGE, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"

parse "name image nodes gpus claim restarts grace" "$@"
need name image nodes gpus claim
need_command
[[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] || fail "--name=$name: small letters, digits and -"
restarts=${restarts:-20}
grace=${grace:-300}
numbers nodes gpus restarts grace
[[ $image =~ ^[A-Za-z0-9._/:@-]+$ && $claim =~ ^[a-z0-9.-]+$ ]] || fail "bad --image or --claim"
need_tool kubectl

json "${command[@]}"
fill_in "$(dirname "$0")/k8s_job.yaml" NAME "$name" NODES "$nodes" FAILURES $((restarts * nodes)) \
  IMAGE "$image" GPUS "$gpus" CLAIM "$claim" GRACE "$grace" COMMAND "$json"
apply "$manifest"
