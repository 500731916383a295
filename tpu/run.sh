#!/usr/bin/env bash
# The job on one host: RUN=demo BUCKET=NAME HOSTS=1 JOB='improve CONFIG key=value …' bash tpu/run.sh   (in the code's folder)
# On one host the run's folder is on its disk, with a snapshot in the bucket every minute; several hosts write one folder
# of the mounted bucket. The exit code is jaxmerge's: 75 and 76 mean that the same command goes on.
set -euo pipefail

bin=$HOME/jaxmerge-venv/bin
export JAX_COMPILATION_CACHE_DIR=gs://$BUCKET/compile-cache PYTHONUNBUFFERED=1
words=()
eval "words=($JOB)" # a quoted value may hold spaces

if [ "${HOSTS:-1}" -gt 1 ]; then
  exec "$bin/jaxmerge" "${words[@]}" distributed.auto=true "out=${JAXMERGE_MOUNT:-/mnt/jaxmerge-runs}/runs/$RUN/run"
fi
folder=$HOME/runs/$RUN
mkdir -p "$HOME/runs"
exec "$bin/python" -m tpu.snapshot keep "$folder" "gs://$BUCKET/runs/$RUN/state" -- \
  "$bin/jaxmerge" "${words[@]}" "out=$folder"
