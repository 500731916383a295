#!/usr/bin/env bash
# Make a worker ready for a run, or see in a moment that it is: bash setup.sh RUN
# Reads ~/jaxmerge/RUN/job.env (written by tpu.launch) and ~/jaxmerge/RUN/code. What is done is not done again:
# the file venv/ready holds the checksums the environment was made from; a mount that is there stays.
set -euo pipefail

run=$1
folder=$HOME/jaxmerge/$run
cd "$folder"
# shellcheck source=/dev/null
. ./job.env
mount_point=${JAXMERGE_MOUNT:-/mnt/jaxmerge}

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
# The image's own updates may hold the lock of dpkg for minutes after the first boot.
apt() { sudo apt-get -qq -o DPkg::Lock::Timeout=600 "$@"; }

# A Python that jaxmerge runs on, with venv. The images of today bring 3.10.
find_python() {
  local name
  for name in python3.12 python3.11; do
    if "$name" -c 'import ensurepip, venv' > /dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  if ! python3 -m uv --version > /dev/null 2>&1; then
    python3 -m pip --version > /dev/null 2>&1 || { apt update && apt install -y python3-pip; } >&2
    python3 -m pip install -qq --user uv >&2
  fi
  python3 -m uv python install -q 3.12 >&2
  python3 -m uv python find 3.12
}

# The bucket as a file system, with the semantics a run folder needs: nothing remembered about files that another host
# may have changed, and a file is in the bucket when fsync or close returns.
mount_bucket() {
  local bucket=${1#gs://}
  if ! command -v gcsfuse > /dev/null; then
    if ! apt install -y gcsfuse > /dev/null 2>&1; then
      gcloud storage cp "gs://$bucket/tools/gcsfuse.deb" "$folder/gcsfuse.deb" --quiet \
        || fail "gcsfuse is not installed: put its Debian package at gs://$bucket/tools/gcsfuse.deb, or use shared=HOST:/EXPORT"
      apt install -y fuse "$folder/gcsfuse.deb"
    fi
  fi
  cat > "$folder/gcsfuse.yaml" << 'YAML'
metadata-cache: {ttl-secs: 0, negative-ttl-secs: 0}
file-system: {kernel-list-cache-ttl-secs: 0}
write: {enable-streaming-writes: false}
YAML
  gcsfuse --config-file="$folder/gcsfuse.yaml" "$bucket" "$mount_point" > "$folder/gcsfuse.log" 2>&1 \
    || fail "gs://$bucket could not be mounted: $(tail -n 2 "$folder/gcsfuse.log")"
}

mount_shared() {
  if mountpoint -q "$mount_point"; then
    return
  fi
  sudo mkdir -p "$mount_point"
  case $JAXMERGE_SHARED in
    gs://*)
      sudo chown "$(id -u):$(id -g)" "$mount_point"
      mount_bucket "$JAXMERGE_SHARED"
      ;;
    *)
      command -v mount.nfs > /dev/null || { apt update && apt install -y nfs-common; }
      # hard: a server that is away for a while is waited for; sync on close is NFS's own promise.
      sudo mount -t nfs -o hard,noatime "$JAXMERGE_SHARED" "$mount_point"
      sudo mkdir -p "$mount_point/runs"
      sudo chown "$(id -u):$(id -g)" "$mount_point/runs"
      ;;
  esac
  say "$JAXMERGE_SHARED is mounted at $mount_point"
}

exec 9> setup.lock
flock 9 # two launchers at once: the second waits, and finds all done

if [ -n "$JAXMERGE_SHARED" ]; then
  mount_shared
fi

sums="$(cksum code/pyproject.toml code/constraints.txt) $JAXMERGE_PACKAGES"
if [ -f venv/ready ] && [ "$(cat venv/ready)" = "$sums" ]; then
  say "ready"
  exit 0
fi

python=$(find_python)
say "environment with $python"
rm -rf venv
"$python" -m venv venv
install() { venv/bin/python -m pip install -qq --disable-pip-version-check "$@"; }
# gcsfs: JAX's compile cache writes to gs:// through etils and fsspec.
(cd code && ../venv/bin/python -m pip install -qq --disable-pip-version-check \
  -c constraints.txt -e '.[train]' 'jax[tpu]' gcsfs)
if [ -n "$JAXMERGE_PACKAGES" ]; then
  # shellcheck disable=SC2086 # several requirements, apart by spaces
  install --no-deps $JAXMERGE_PACKAGES
fi
printf '%s' "$sums" > venv/ready
say "ready"
