#!/usr/bin/env bash
# tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS of resnet_flax.main]
#
#   create    the TPU VM, unless it is there; waits until it is ready
#   install   this checkout and its environment, on all workers
#   start     the run, in the background on all workers; with --bucket it goes on from what lies there
#   follow    worker 0's log
#   status    of the VM, and of the run on every worker
#   watch     create, install and start as needed, again after a preemption, until the run has ended
#   stop      ask the run to save and end
#   fetch     the run's directory to runs/RUN here
#   delete    the VM (and its queued resource); with --bucket the run is saved there first
#
#   --type=v5litepod-16    accelerator type        --version=...   runtime, by default the type's
#   --spot                 cheaper, preemptible    --queued        wait in Google's queue for it
#   --project=PROJECT      gcloud's by default     --run=RUN       the run's name, by default NAME
#   --bucket=gs://B/path   where the run is kept: a preempted VM's disk is lost
#   --poll=30              seconds between looks   --save_every=60 seconds between copies to the bucket
#   --dry_run              print the commands, run none
#
# Every command may be given again. Needs gcloud, logged in, and `ssh-add` for several workers.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { echo "tpu_vm: $*" >&2; }
fail() { echo "error: $*" >&2; exit 1; }
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }

command=${1-}
[[ $command =~ ^(create|install|start|follow|status|watch|stop|fetch|delete)$ ]] || usage
shift
name='' zone='' type=v5litepod-8 version='' project='' run='' bucket='' poll=30 save_every=60
spot=0 queued=0 dry_run=0
while [ $# -gt 0 ]; do
  case $1 in
  --name=* | --zone=* | --type=* | --version=* | --project=* | --run=* | --bucket=* | --poll=* | --save_every=*)
    variable=${1%%=*}
    printf -v "${variable#--}" %s "${1#*=}"
    ;;
  --spot) spot=1 ;;
  --queued) queued=1 ;;
  --dry_run) dry_run=1 ;;
  --) shift; break ;;
  *) fail "unknown option '$1' (flags of the training program come after --)" ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name=NAME is missing: the TPU VM's"
[ -n "$zone" ] || fail "--zone=ZONE is missing, for example us-central1-a"
run=${run:-$name}
[[ $run =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "--run='$run' must be of letters, digits, '.', '_' and '-'"
[[ -z $bucket || $bucket == gs://?* ]] || fail "--bucket='$bucket' must begin with gs://"
if [[ $command =~ ^(start|watch)$ ]]; then
  [ $# -gt 0 ] || fail "no flags of the training program; for example -- --config=configs/resnet20.py"
  for flag in "$@"; do
    [[ $flag != --workdir* && $flag != --distributed* ]] || fail "$flag is set by this script; name the run with --run"
  done
fi
if [ -z "$version" ]; then
  case $type in # https://cloud.google.com/tpu/docs/runtimes
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
  esac
fi
[ $dry_run = 1 ] || command -v gcloud >/dev/null || fail "gcloud is not on PATH; it comes with Google Cloud's SDK, https://cloud.google.com/sdk/docs/install"
[ $dry_run = 1 ] || [ -n "$project$(gcloud config get-value project 2>/dev/null)" ] || fail "no Google Cloud project: give --project=PROJECT, or run gcloud config set project PROJECT"

do_it() {
  if [ $dry_run = 1 ]; then printf '+'; printf ' %q' "$@"; echo; else "$@"; fi
}
tpus() {
  do_it gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"} --quiet
}
remote() { # WORKER ARGUMENTS...: worker.sh there; quoted for the shell, of whatever kind, at the other end.
  local worker=$1 line='bash resnet_flax/launch/worker.sh' quote="'\\''" word
  shift
  for word in "$@"; do line+=" '${word//\'/$quote}'"; done
  tpus tpu-vm ssh "$name" --worker="$worker" --strict-host-key-checking=no --command="$line"
}
ask() { # KIND FORMAT: one field of a description, ABSENT where there is no such thing.
  local answer errors
  errors=$(mktemp)
  if answer=$(tpus "$1" describe "$name" --format="value($2)" 2>"$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found' "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}
state() {
  local queue
  if [ $queued = 1 ]; then
    queue=$(ask queued-resources state.state)
    [ "$queue" = ACTIVE ] || { echo "$queue"; return; }
  fi
  ask tpu-vm state
}

make() {
  local options=(--accelerator-type="$type")
  [ $spot = 0 ] || options+=(--spot)
  if [ $queued = 1 ]; then
    tpus queued-resources create "$name" --node-id="$name" --runtime-version="$version" "${options[@]}"
  else
    tpus tpu-vm create "$name" --version="$version" "${options[@]}"
  fi
}
remove() {
  if [ $queued = 1 ]; then
    tpus queued-resources delete "$name" --force
  else
    tpus tpu-vm delete "$name"
  fi
}
create() {
  [ $dry_run = 0 ] || { make; return; }
  local now before='' made=0
  while :; do
    now=$(state) || return 1
    [ "$now" = "$before" ] || say "$name is $now"
    before=$now
    case $now in
    READY) return ;;
    ABSENT)
      make || return 1
      made=1 before=''
      continue
      ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
      [ $made = 0 ] || return 1 # Lost as soon as it was made: for `watch` to try again later.
      remove || return 1
      continue
      ;;
    esac
    sleep "$poll"
  done
}
install() {
  local archive=$name.tar.gz folder=/tmp unpack parts=(pyproject.toml README.md resnet_flax configs launch)
  [ ! -d "$root/.git" ] || parts+=(.git) # Runs record the commit.
  [ $dry_run = 1 ] || folder=$(mktemp -d)
  printf -v unpack 'mkdir -p resnet_flax && tar -xzf %q -C resnet_flax && bash resnet_flax/launch/worker.sh install' "$archive"
  # 1: a file changed while it was read, as git's index does when anybody asks for the status.
  do_it tar -C "$root" --exclude=__pycache__ -czf "$folder/$archive" "${parts[@]}" || [ $? = 1 ] || return 1
  tpus tpu-vm scp "$folder/$archive" "$name:$archive" --worker=all --strict-host-key-checking=no &&
    tpus tpu-vm ssh "$name" --worker=all --strict-host-key-checking=no --command="$unpack" || return 1
  [ $dry_run = 1 ] || rm -r "$folder"
}
start() {
  if [ -n "$bucket" ]; then
    # Worker 0 writes the run: what it has is newer than the bucket.
    remote 0 save "$run" "$bucket" && remote all restore "$run" "$bucket" || return 1
  elif [ $spot = 1 ]; then
    say "without --bucket a preemption loses the run"
  fi
  remote all start "$run" -- "$@" || return 1
  [ -z "$bucket" ] || remote 0 keep "$run" "$bucket" "$save_every"
}
again() {
  create && install && start "$@"
}
watch() {
  [ $dry_run = 0 ] || { again "$@"; say "then looks every $poll s; does it again after a preemption"; return; }
  local now workers failed=0 silent=0 errors
  errors=$(mktemp)
  while :; do
    if ! now=$(state); then
      [ $((silent += 1)) -lt 10 ] || fail "gcloud has not answered $silent times"
      sleep "$poll"
      continue
    fi
    silent=0
    case $now in
    READY)
      workers=$(remote all status "$run" 2>/dev/null | grep -E '^(running|died|absent|ended [0-9]+)$' | sort | uniq -c) || workers=unreachable
      if [ "$workers" = unreachable ] || [[ $workers == *running* ]]; then
        failed=0
      elif [[ ! $workers =~ died|absent|ended\ [1-9] ]]; then
        say "$run has ended"
        return
      elif [[ ! $workers =~ died|absent|ended\ (143|130) ]]; then
        # A worker's death fails the others a moment before the VM's state tells of it.
        [ $((failed += 1)) -lt 2 ] || fail "$run has failed; see tpu_vm.sh follow: $(tr -s ' \n' ' ' <<<"$workers")"
      else
        say "$run is not running:" $workers
        again "$@" || say "could not start it; trying again in $poll s"
      fi
      ;;
    ABSENT | PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
      say "$name is $now: making it"
      if ! again "$@" 2> >(tee "$errors" >&2); then
        ! grep -qi quota "$errors" || fail "no quota for $type in $zone: see above; ask for more, or use another --zone or --type"
        say "not now; trying again in $poll s"
      fi
      ;;
    esac
    sleep "$poll"
  done
}

case $command in
create) create || fail "gcloud could not make $name ($type in $zone): see above" ;;
watch | start) "$command" "$@" ;;
install) install ;;
follow) remote 0 follow "$run" ;;
stop) remote all stop "$run" ;;
status)
  [ $dry_run = 1 ] || now=$(state)
  echo "${now-}"
  [ "${now-READY}" != READY ] || remote all status "$run"
  ;;
fetch)
  do_it mkdir -p "runs${bucket:+/$run}"
  if [ -n "$bucket" ]; then
    do_it gcloud storage rsync --recursive "${bucket%/}/$run" "runs/$run"
  else
    tpus tpu-vm scp --recurse "$name:runs/$run" runs --worker=0 --strict-host-key-checking=no
  fi
  ;;
delete)
  if [ $dry_run = 0 ]; then
    now=$(state)
    [ "$now" != ABSENT ] || { say "there is no $name"; exit 0; }
  fi
  if [ -n "$bucket" ] && [ "${now-READY}" = READY ]; then
    remote all stop "$run"
    remote 0 save "$run" "$bucket"
  fi
  remove
  ;;
esac
