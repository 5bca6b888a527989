#!/usr/bin/env bash
# A training run on the GPUs of several Kubernetes nodes; continues after preemption.
#
#   launch/k8s.sh --name=NAME --image=IMAGE --nodes=4 --gpus=8 --claim=VOLUME_CLAIM
#       [--restarts=20] [--dry_run] -- python -m ppflow_jax.main --workdir=/data/runs/b2 ...
#
# IMAGE holds this project, installed; VOLUME_CLAIM (read-write by many) is mounted as /data.
# --dry_run prints the manifest. To stop: kubectl delete job NAME, which saves; the same command
# continues. Flags may come from PPFLOW_NAME, PPFLOW_IMAGE, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"

parse "name image nodes gpus claim restarts" "$@"
need name image nodes gpus claim
need_command
[[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] || fail "--name=$name: small letters, digits and -"
restarts=${restarts:-20}
[[ $nodes$gpus$restarts =~ ^[0-9]+$ ]] || fail "--nodes, --gpus and --restarts are numbers"
[[ $image =~ ^[A-Za-z0-9._/:@-]+$ && $claim =~ ^[a-z0-9.-]+$ ]] || fail "bad --image or --claim"
need_tool kubectl

json=""
for word in "${command[@]}"; do # a JSON list, which YAML reads
  [[ $word != *$'\n'* ]] || fail "the command must be one line"
  word=${word//\\/\\\\}
  json+="${json:+, }\"${word//\"/\\\"}\""
done
# shellcheck disable=SC2016 # the names of what is filled in, not their values
fill() { manifest=${manifest//"\${$1}"/"$2"}; }
manifest=$(<"$(dirname "$0")/k8s_job.yaml")
fill NAME "$name"
fill NODES "$nodes"
fill RESTARTS "$restarts"
fill IMAGE "$image"
fill GPUS "$gpus"
fill CLAIM "$claim"
fill COMMAND "[$json]"
if $dry_run; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
