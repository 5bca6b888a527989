#!/usr/bin/env bash
# A training run on TPU slices of Google Kubernetes Engine, TPU7x too; continues after preemption.
#
#   launch/gke_tpu.sh ACTION --name=NAME --type=v6e:16x16 [--slices=2] [--spot=yes] [--dry_run] ...
#
#   pools --cluster=CLUSTER --location=REGION [--zone=ZONE] [--project=PROJECT]
#                                      a node pool for each slice; for TPU7x its workload policy
#   run --image=IMAGE [--claim=VOLUME_CLAIM] [--grace=300] [--restarts=100]
#       -- ppflow train --workdir=gs://BUCKET/RUN ...            a JobSet, by kubectl
#   xpk --image=IMAGE --cluster=CLUSTER --zone=ZONE [--project=PROJECT] [--grace=300]
#       [--restarts=100] -- ppflow train ...                     the same by XPK, on its clusters
#
# --type is the chip (v5e, v5p, v6e, tpu7x) and the topology of a slice, as for --dry_run of
# ppflow train. IMAGE holds this project, installed with [tpu]; VOLUME_CLAIM is mounted as /data.
# --policy: name of the workload policy, tpu7x-TOPOLOGY if not given. --grace: seconds from SIGTERM
# to SIGKILL; of the 30 s notice of a spot node GKE leaves pods 15 s unless the pool is told
# otherwise. `run` needs JobSet 0.10 or newer in the cluster; kubectl delete jobset NAME saves and
# ends, the same command continues. Flags may come from PPFLOW_NAME, PPFLOW_TYPE, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"

(($#)) || fail "give an action: pools, run or xpk"
action=$1
shift
parse "name type slices spot cluster location zone project image claim policy grace restarts" "$@"
need name type
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: at most 40 small letters, digits and -"
slices=${slices:-1}
grace=${grace:-300}
restarts=${restarts:-100}
numbers slices grace restarts

# What each chip is called: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and
# .../tpu-ironwood. Slices of one chip are machines of one chip; all others have four a machine.
chip=${type%%:*}
topology=${type#*:}
case $chip in
  v5e) accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu xpk_type=v5litepod flat=true most=256 ;;
  v5p) accelerator=tpu-v5p-slice machine=ct5p-hightpu xpk_type=v5p flat=false most=6144 ;;
  v6e) accelerator=tpu-v6e-slice machine=ct6e-standard xpk_type=v6e flat=true most=256 ;;
  tpu7x) accelerator=tpu7x machine=tpu7x-standard xpk_type=tpu7x flat=false most=9216 ;;
  *) fail "--type=$type: write CHIP:TOPOLOGY, the chip one of v5e, v5p, v6e, tpu7x" ;;
esac
flat_ones="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
small_ones="2x2x1 2x2x2 2x2x4 2x4x4"
known="$small_ones, and multiples of 4, the smallest first, up to $most chips"
if $flat; then known=$flat_ones; fi
IFS=x read -ra sides <<<"$topology"
chips=1
good=true
for side in "${sides[@]}"; do
  if [[ $type == *:* && $side =~ ^[1-9][0-9]{0,3}$ ]]; then chips=$((chips * side)); else good=false; fi
done
if $flat; then
  [[ " $flat_ones " == *" $topology "* ]] || good=false
elif $good && [[ " $small_ones " != *" $topology "* ]]; then
  if ((${#sides[@]} != 3 || chips > most || sides[0] > sides[1] || sides[1] > sides[2])); then good=false; fi
  for side in "${sides[@]}"; do ((side % 4 == 0)) || good=false; done
fi
$good || fail "--type=$type: write $chip:TOPOLOGY; there are: $known"
each=$((chips < 4 ? chips : 4)) # chips of a machine
hosts=$((chips / each))
((slices == 1 || hosts > 1)) || fail "--slices=$slices: only slices of several machines can be joined"
policy=${policy:-tpu7x-$topology}
placed=false # TPU7x of several machines needs a workload policy
if [[ $chip == tpu7x ]] && ((hosts > 1)); then placed=true; fi

pools() {
  need cluster location
  need_tool gcloud
  local k region=$location
  local options=(--cluster="$cluster" --location="$location" --machine-type="$machine-${each}t")
  options+=(--num-nodes="$hosts")
  if [[ -n $zone ]]; then options+=(--node-locations="$zone"); fi
  if [[ -n $spot ]]; then options+=(--spot); fi
  local in=()
  if [[ -n $project ]]; then in=(--project="$project"); fi
  if [[ $region =~ ^(.*)-[a-z]$ ]]; then region=${BASH_REMATCH[1]}; fi
  # .../concepts/tpu-ironwood: "This policy replaces the --tpu-topology flag"
  if $placed; then
    if $dry_run || ! gcloud compute resource-policies describe "$policy" --region="$region" \
      "${in[@]}" >/dev/null 2>&1; then
      run gcloud compute resource-policies create workload-policy "$policy" --region="$region" \
        --type=HIGH_THROUGHPUT --accelerator-topology="$topology" "${in[@]}"
    fi
    options+=(--placement-policy="$policy")
  elif ((hosts > 1)) || [[ $chip != tpu7x ]]; then
    options+=(--tpu-topology="$topology")
  fi
  for ((k = 0; k < slices; k++)); do
    run gcloud container node-pools create "$name-$k" "${options[@]}" "${in[@]}"
  done
}

jobset() {
  need image
  need_command
  [[ $image =~ ^[A-Za-z0-9._/:@-]+$ && $claim =~ ^[a-z0-9.-]*$ ]] || fail "bad --image or --claim"
  need_tool kubectl
  local selector tolerations="[]" mounts="[]" volumes="[]"
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator"
  selector+=", cloud.google.com/gke-tpu-topology: $topology"
  if $placed; then selector+=", cloud.google.com/placement-policy-name: $policy"; fi
  if [[ -n $spot ]]; then
    selector+=', cloud.google.com/gke-spot: "true"'
    tolerations='[{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]'
  fi
  if [[ -n $claim ]]; then
    mounts="[{name: data, mountPath: /data}]"
    volumes="[{name: data, persistentVolumeClaim: {claimName: $claim}}]"
  fi
  json "${command[@]}"
  fill_in "$(dirname "$0")/gke_tpu.yaml" NAME "$name" SLICES "$slices" HOSTS "$hosts" CHIPS "$each" \
    RESTARTS "$restarts" GRACE "$grace" SELECTOR "{$selector}" TOLERATIONS "$tolerations" \
    IMAGE "$image" MOUNTS "$mounts" VOLUMES "$volumes" COMMAND "$json"
  apply "$manifest"
}

by_xpk() { # github.com/AI-Hypercomputer/xpk: it restarts after 127 to 255 and what is named
  need image cluster zone
  need_command
  need_tool xpk
  local options=(--cluster="$cluster" --zone="$zone")
  if [[ -n $project ]]; then options+=(--project="$project"); fi
  if [[ -n $spot ]]; then options+=(--spot); fi
  run xpk workload create --workload="$name" --tpu-type="$xpk_type-$topology" \
    --num-slices="$slices" "${options[@]}" --docker-image="$image" --max-restarts="$restarts" \
    --restart-on-exit-codes=75 --termination-grace-period-seconds="$grace" \
    --command="$(quote "${command[@]}")"
}

case $action in
  pools) pools ;;
  run) jobset ;;
  xpk) by_xpk ;;
  *) fail "unknown action '$action': pools, run or xpk" ;;
esac
