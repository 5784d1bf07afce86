#!/usr/bin/env bash
# A run on Cloud TPU VMs: one slice, or several that a slow network connects. Run it from any machine with gcloud.
#
#   NAME=llama ZONE=us-east5-a TYPE=v5p-128 SLICES=2 launch/tpu_vm.sh create
#   NAME=llama ZONE=us-east5-a SLICES=2 BUCKET=gs://my-bucket launch/tpu_vm.sh run llama31_8b \
#       --config.mesh.data=2 --config.data.train=/mnt/bucket/text --config.output=/mnt/bucket/runs/8b
#   NAME=llama ZONE=us-east5-a SLICES=2 launch/tpu_vm.sh delete
#
# Environment: NAME and ZONE; TYPE the accelerator type; SLICES (default 1); SPOT=1 for spot machines; VERSION the
# software version (default v2-alpha-tpuv5 and the like, by TYPE); REPOSITORY the git URL that hosts clone; and what
# launch/host.sh reads. DRY_RUN=1 prints the commands.
set -euo pipefail

run() { if [ "${DRY_RUN:-0}" = 1 ]; then echo "+ $*"; else "$@"; fi; }

action=${1:-}
shift || true
name=${NAME:?the name of the machines}
zone=${ZONE:?the zone, e.g. us-east5-a}
slices=${SLICES:-1}

slice_names() {
  if [ "$slices" = 1 ]; then echo "$name"; else for ((i = 0; i < slices; i++)); do echo "$name-$i"; done; fi
}

case $action in
  create)
    type=${TYPE:?the accelerator type, e.g. v5p-128}
    case $type in
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      *) version=tpu-ubuntu2204-base ;;
    esac
    nodes=(--node-id "$name")
    if [ "$slices" != 1 ]; then nodes=(--node-count "$slices" --node-prefix "$name"); fi
    run gcloud compute tpus queued-resources create "$name" --zone "$zone" --accelerator-type "$type" \
      --runtime-version "${VERSION:-$version}" "${nodes[@]}" ${SPOT:+--spot}
    ;;
  run)
    # Every host clones the repository and runs launch/host.sh in a session that outlives the connection.
    command="$(printf '%q ' "$@")"
    settings="ACCELERATOR=tpu BUCKET=${BUCKET:-} MOUNT=${MOUNT:-/mnt/bucket} RESTARTS=${RESTARTS:-3}"
    repository=${REPOSITORY:?the git URL of llama_jax}
    script="test -d llama_jax || git clone --depth 1 $repository llama_jax; cd llama_jax; tmux kill-session -t train"
    script+=" 2>/dev/null; tmux new-session -d -s train \"$settings launch/host.sh $command 2>&1 | tee train.log\""
    # Slices of one queued resource are told of each other by Cloud TPU.
    for node in $(slice_names); do
      run gcloud compute tpus tpu-vm ssh "$node" --zone "$zone" --worker all --command "$script"
    done
    ;;
  log)
    run gcloud compute tpus tpu-vm ssh "$(slice_names | head -1)" --zone "$zone" --worker 0 \
      --command "tail -n 20 -f llama_jax/train.log"
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet
    ;;
  *)
    echo "usage: launch/tpu_vm.sh create | run RECIPE [FLAGS] | log | delete" >&2
    exit 2
    ;;
esac
