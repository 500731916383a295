#!/usr/bin/env bash
# The job on one worker: bash run.sh start|status|stop|supervise|foreground RUN
#   start      run the job detached, unless it runs: the ssh session may end, a second start changes nothing
#   status     one line: jaxmerge worker N running|exit|absent CODE|- PHASES
#   stop       SIGTERM to the job, which saves its state and ends with 75; wait for that
#   supervise  restore, run, save every minute, save at the end, leave the exit code (what start detaches)
#   foreground the same with the log shown, ending with the job's code: for launchers that watch by themselves
# Lock and exit code are files of ~/jaxmerge/RUN/job; the log and, on one host, the run folder go to the bucket.
set -euo pipefail

verb=$1
run=$2
folder=$HOME/jaxmerge/$run
job=$folder/job
mkdir -p "$job"
# shellcheck source=/dev/null
. "$folder/job.env"

# A worker's number is the end of its host's name: t1v-n-0123abcd-w-3.
worker=${JAXMERGE_WORKER:-${HOSTNAME##*-w-}}
[[ $worker =~ ^[0-9]+$ ]] || worker=0
python=$folder/venv/bin/python
out=$folder/run
[ -z "$JAXMERGE_SHARED" ] || out=${JAXMERGE_MOUNT:-/mnt/jaxmerge}/runs/$run/run
every=${JAXMERGE_EVERY:-60} # seconds between two saves
tick=${JAXMERGE_TICK:-1}

say() { echo "$(date -u +%FT%TZ) run.sh: $*" >> "$job/log"; }
# A shared lock to look with: two that look do not take each other for the job.
running() { ! flock -sn "$job/lock" true; }

status() {
  local phases=0
  [ ! -f "$out/metrics.jsonl" ] || phases=$(wc -l < "$out/metrics.jsonl")
  if running; then
    echo "jaxmerge worker $worker running - $phases"
  elif [ -f "$job/exit" ]; then
    echo "jaxmerge worker $worker exit $(cat "$job/exit") $phases"
  else
    echo "jaxmerge worker $worker absent - $phases"
  fi
}

start() {
  if running; then
    return
  fi
  rm -f "$job/exit" "$job/pid"
  [ ! -f "$job/log" ] || mv "$job/log" "$job/log.before"
  # stdin, stdout and stderr away from ssh, which else waits for them to close.
  setsid nohup bash "$folder/code/tpu/run.sh" supervise "$run" < /dev/null > /dev/null 2>> "$job/log" &
  local n
  for n in 1 2 3 4 5 6 7 8 9 10; do # so that a status right after says running
    if running || [ -f "$job/exit" ]; then
      return
    fi
    sleep "0.$n"
  done
}

stop() {
  local waited=0
  [ ! -f "$job/pid" ] || kill -TERM "$(cat "$job/pid")" 2> /dev/null || true
  while running && [ "$waited" -lt "${JAXMERGE_STOP_WAIT:-300}" ]; do
    sleep 1
    waited=$((waited + 1))
  done
  if running; then
    say "the job does not end on SIGTERM: killed"
    kill -KILL "$(cat "$job/pid")" 2> /dev/null || true
  fi
}

# The run folder on this one host's disk: a whole snapshot of it in the bucket. On a mount there is nothing to do.
snapshot() {
  if [ -n "$JAXMERGE_SHARED" ]; then
    return
  fi
  case $1 in
    save) [ ! -d "$out" ] || (cd "$folder/code" && "$python" -m tpu.snapshot save "$out" "$JAXMERGE_REMOTE/state") ;;
    restore) (cd "$folder/code" && "$python" -m tpu.snapshot restore "$JAXMERGE_REMOTE/state" "$out") ;;
  esac >> "$job/log" 2>&1
}

upload_log() {
  gcloud storage cp "$job/log" "$JAXMERGE_REMOTE/logs/$stamp-worker-$worker.log" --quiet > /dev/null 2>&1
}

save() {
  local result=0
  snapshot save || result=$?
  upload_log || result=$?
  return "$result"
}

# Values of secrets are in this process's environment alone: in no file, no argument list, no log.
read_secrets() {
  local pair name value
  for pair in $JAXMERGE_SECRETS; do
    name=${pair%%=*}
    value=$(gcloud secrets versions access latest --secret="${pair#*=}" --project="$JAXMERGE_PROJECT" 2>> "$job/log") || {
      say "the secret ${pair#*=} cannot be read: give the worker's service account the role Secret Manager Secret Accessor"
      return 2
    }
    export "$name=$value"
  done
}

leave() {
  echo "$1" > "$job/exit.tmp"
  mv "$job/exit.tmp" "$job/exit"
  exit 0
}

supervise() {
  exec 9> "$job/lock"
  flock -w 5 9 || exit 0 # somebody looking is gone in a moment; another supervisor is not
  trap : TERM HUP INT # at a shutdown this too is told; it stays until the job has saved
  stamp=$(date -u +%Y%m%dT%H%M%SZ)
  say "worker $worker starts: $JAXMERGE_JOB"
  local code=0 try child words
  snapshot restore || { say "restoring failed"; upload_log || true; leave 74; }
  read_secrets || { upload_log || true; leave 2; }
  export JAX_COMPILATION_CACHE_DIR=$JAXMERGE_CACHE PYTHONUNBUFFERED=1
  eval "words=($JAXMERGE_JOB)" # quoted by the launcher
  cd "$folder/code"
  "$folder/venv/bin/jaxmerge" "${words[@]}" "out=$out" >> "$job/log" 2>&1 < /dev/null &
  child=$!
  echo "$child" > "$job/pid"
  SECONDS=0
  while kill -0 "$child" 2> /dev/null; do
    sleep "$tick" 9>&- || true
    if [ "$SECONDS" -ge "$every" ]; then
      save || say "saving failed; the snapshot before stands"
      SECONDS=0
    fi
  done
  wait "$child" || code=$?
  say "the job ended with $code"
  for try in 1 2 3 4; do
    if save; then
      leave "$code"
    fi
    sleep "$((try * ${JAXMERGE_RETRY:-10}))"
  done
  say "the end could not be saved"
  leave 74
}

foreground() {
  trap 'stop' TERM INT
  start
  touch "$job/log"
  tail -n 0 -F "$job/log" &
  while running; do
    sleep "$tick" || true
  done
  kill "$!" 2> /dev/null || true
  exit "$(cat "$job/exit" 2> /dev/null || echo 74)"
}

case $verb in
  start | status | stop | supervise | foreground) "$verb" ;;
  *) echo "usage: run.sh start|status|stop|supervise|foreground RUN" >&2; exit 2 ;;
esac
