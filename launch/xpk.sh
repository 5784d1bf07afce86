#!/usr/bin/env bash
# A run on GKE with xpk (https://github.com/AI-Hypercomputer/xpk), which makes the JobSet and starts it.
#
#   CLUSTER=my-cluster TYPE=v5p-128 SLICES=2 IMAGE=REGISTRY/llama_jax:latest launch/xpk.sh llama31_8b \
#       --config.data.train=/mnt/bucket/text --config.output=/mnt/bucket/runs/8b
#
# The bucket is mounted by a storage of the cluster: xpk storage attach NAME --mount-point=/mnt/bucket. DRY_RUN=1 prints
# the command.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: launch/xpk.sh RECIPE [--config.KEY=VALUE ...]" >&2
  exit 2
fi
command="INSTALL=0 COORDINATOR=auto bash launch/host.sh $(printf '%q ' "$@")"
arguments=(xpk workload create --cluster "${CLUSTER:?the cluster}" --workload "${NAME:-llama-jax}"
  --tpu-type "${TYPE:?the accelerator type, e.g. v5p-128}" --num-slices "${SLICES:-1}"
  --docker-image "${IMAGE:?the image that launch/Dockerfile makes}" --max-restarts "${RESTARTS:-20}"
  --command "$command")
if [ "${DRY_RUN:-0}" = 1 ]; then printf '+'; printf ' %q' "${arguments[@]}"; echo; else "${arguments[@]}"; fi
