#!/usr/bin/env bash
# Make a host ready, or see in a moment that it is: BUCKET=NAME HOSTS=1 PACKAGES='…' bash tpu/setup.sh   (in the code's folder)
# The environment is ~/jaxmerge-venv; its file `ready` holds the checksums it was made from. Of several hosts each mounts
# the bucket, because they write one run folder together.
set -euo pipefail

venv=$HOME/jaxmerge-venv
mount_point=${JAXMERGE_MOUNT:-/mnt/jaxmerge-runs}
packages=${PACKAGES:-}

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
# The image's own updates may hold the lock of dpkg for minutes after the first boot.
apt() { sudo apt-get -qq -o DPkg::Lock::Timeout=600 "$@"; }

# uv brings a Python that jaxmerge runs on; the images of today bring 3.10.
find_uv() {
  if command -v uv > /dev/null; then
    echo uv
    return
  fi
  if ! python3 -m uv --version > /dev/null 2>&1; then
    python3 -m pip --version > /dev/null 2>&1 || { apt update && apt install -y python3-pip; } >&2
    python3 -m pip install -qq --user uv >&2
  fi
  echo "python3 -m uv"
}

# The bucket as a file system, with the semantics a run folder needs: nothing remembered about files that another host
# may have changed, a file in the bucket when fsync or close returns, a folder renamed in one step. SkyPilot's own mounts
# (0.14: gcsfuse 2.2 with caches of five seconds) promise none of these.
mount_bucket() {
  if mountpoint -q "$mount_point"; then
    return
  fi
  if ! gcsfuse --version 2> /dev/null | grep -q "version 3"; then
    if ! apt install -y gcsfuse > /dev/null 2>&1 || ! gcsfuse --version | grep -q "version 3"; then
      gcloud storage cp "gs://$BUCKET/tools/gcsfuse.deb" "$HOME/gcsfuse.deb" --quiet \
        || fail "gcsfuse 3 is not installed: put its Debian package at gs://$BUCKET/tools/gcsfuse.deb"
      apt install -y fuse "$HOME/gcsfuse.deb"
    fi
  fi
  cat > "$HOME/gcsfuse.yaml" << 'YAML'
metadata-cache: {ttl-secs: 0, negative-ttl-secs: 0}
file-system: {kernel-list-cache-ttl-secs: 0}
write: {enable-streaming-writes: false}
YAML
  sudo mkdir -p "$mount_point"
  sudo chown "$(id -u):$(id -g)" "$mount_point"
  gcsfuse --config-file="$HOME/gcsfuse.yaml" "$BUCKET" "$mount_point" > "$HOME/gcsfuse.log" 2>&1 \
    || fail "gs://$BUCKET could not be mounted: $(tail -n 2 "$HOME/gcsfuse.log")"
  say "gs://$BUCKET is mounted at $mount_point"
}

if [ "${HOSTS:-1}" -gt 1 ]; then
  # Only there is renaming a folder one step, which is how a phase and a checkpoint are committed.
  gcloud storage buckets describe "gs://$BUCKET" --raw --format='value(hierarchicalNamespace.enabled)' | grep -qi true \
    || fail "gs://$BUCKET has no hierarchical namespace, which several hosts need; make one that has (docs/tpu.md)"
  mount_bucket
fi

sums="$(cksum pyproject.toml constraints.txt) $packages"
if [ -f "$venv/ready" ] && [ "$(cat "$venv/ready")" = "$sums" ]; then
  say "ready"
  exit 0
fi
found=$(find_uv)
read -ra uv <<< "$found"
say "environment with ${uv[*]}"
rm -rf "$venv"
"${uv[@]}" venv -q --python 3.12 "$venv"
install() { "${uv[@]}" pip install -q --python "$venv/bin/python" "$@"; }
# gcsfs: JAX's compile cache writes to gs:// through etils and fsspec.
install -c constraints.txt -e '.[tpu]' gcsfs
if [ -n "$packages" ]; then
  # shellcheck disable=SC2086 # several requirements, apart by spaces
  install --no-deps $packages
fi
printf '%s' "$sums" > "$venv/ready"
say "ready"
