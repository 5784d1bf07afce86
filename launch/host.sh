#!/usr/bin/env bash
# One host of a run, from an empty machine to training. Run the same command on every host; run it again to resume.
#
#   launch/host.sh llama31_8b --config.init_from=... --config.data.train=... --config.output=...
#
# Environment:
#   ACCELERATOR  tpu (default), cuda, cuda12 or cpu: the extra of the installation
#   INSTALL      0 uses the environment as it is (default 1: a virtual environment in $VENV)
#   VENV         folder of the virtual environment (default ~/.venvs/llama_jax)
#   BUCKET       gs://NAME[/FOLDER] or s3://NAME[/FOLDER], mounted at $MOUNT (default: nothing is mounted). Flags may
#                name addresses of a store instead, such as --config.output=gs://NAME/runs/8b
#   MOUNT        where the bucket is mounted (default /mnt/bucket)
#   COORDINATOR  auto (default: TPU pods, Slurm and GKE know it), HOST:PORT, or empty for one host
#   PROCESSES    number of hosts, PROCESS number of this host from 0, where COORDINATOR is HOST:PORT
#   RESTARTS     how often a run that fails is started again (default 0); mistakes in flags never are
#   DRY_RUN      1 prints the commands instead of running them
set -euo pipefail
cd "$(dirname "$0")/.."

run() { if [ "${DRY_RUN:-0}" = 1 ]; then echo "+ $*"; else "$@"; fi; }

if [ $# -lt 1 ]; then
  echo "usage: launch/host.sh RECIPE [--config.KEY=VALUE ...]" >&2
  exit 2
fi
recipe=$1
shift

accelerator=${ACCELERATOR:-tpu}
python=python3
if [ "${INSTALL:-1}" = 1 ]; then
  venv=${VENV:-$HOME/.venvs/llama_jax}
  [ -x "$venv/bin/python" ] || run python3 -m venv "$venv"
  extras=data # and the package that reads and writes the store of each address in the flags
  case " $*" in *[=,\ ]gs://* | *[=,\ ]gcs://*) extras+=,gcs ;; esac
  case " $*" in *[=,\ ]s3://* | *[=,\ ]s3a://*) extras+=,s3 ;; esac
  case $accelerator in
    tpu | cuda | cuda12) run "$venv/bin/pip" install --quiet ".[$accelerator,$extras]" ;;
    cpu) run "$venv/bin/pip" install --quiet ".[$extras]" ;;
    *) echo "ACCELERATOR=$accelerator must be tpu, cuda, cuda12 or cpu" >&2; exit 2 ;;
  esac
  python=$venv/bin/python
fi

mount=${MOUNT:-/mnt/bucket}
if [ -n "${BUCKET:-}" ] && ! mountpoint -q "$mount"; then
  scheme=${BUCKET%%://*}
  path=${BUCKET#*://}
  name=${path%%/*}
  folder=${path#"$name"}
  folder=${folder#/}
  run mkdir -p "$mount"
  case $scheme in
    # Reads of many ranges and renames of whole checkpoints: https://cloud.google.com/storage/docs/cloud-storage-fuse
    gs) run gcsfuse --implicit-dirs --rename-dir-limit=100000 ${folder:+--only-dir "$folder"} "$name" "$mount" ;;
    # A general-purpose S3 bucket has no rename, which checkpoints need: use an S3 Express bucket, or a shared disk.
    s3) run mount-s3 --allow-delete --allow-overwrite ${folder:+--prefix "$folder/"} "$name" "$mount" ;;
    *) echo "BUCKET=$BUCKET must begin with gs:// or s3://" >&2; exit 2 ;;
  esac
fi

if [ "$accelerator" = cuda ] || [ "$accelerator" = cuda12 ]; then
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
fi

coordinator=${COORDINATOR-auto}
connection=()
if [ -n "$coordinator" ]; then
  connection=("--config.distributed.coordinator=$coordinator")
  if [ "$coordinator" != auto ]; then
    connection+=("--config.distributed.num_processes=${PROCESSES:?the number of hosts}")
    connection+=("--config.distributed.process_id=${PROCESS:?the number of this host, from 0}")
  fi
fi

tries=0
while :; do
  status=0
  run "$python" train.py --config "$recipe" "${connection[@]}" "$@" || status=$?
  # 0 is the end; 2 is an error that would come again; 130 and 143 follow Ctrl-C and SIGTERM, after a checkpoint.
  # 75 follows the loss of another host.
  case $status in 0 | 2 | 130 | 143) exit $status ;; esac
  tries=$((tries + 1))
  if [ $tries -gt "${RESTARTS:-0}" ]; then exit $status; fi
  echo "launch/host.sh: status $status, start $tries of ${RESTARTS} again from the newest checkpoint" >&2
  run sleep 30
done
