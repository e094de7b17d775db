#!/usr/bin/env bash
# worker.sh COMMAND ...: what tpu_vm.sh does on each worker of a TPU VM. Run it there by hand, too.
#
#   install                      the project and its environment, .venv beside this folder
#   start RUN -- FLAGS           begin training in the background, in ~/runs/RUN; survives the ssh
#   status RUN                   "running", "ended STATUS", "died" (no status left) or "absent"
#   follow RUN                   the log, until the run ends
#   stop RUN                     ask it to save and end; waits for that
#   save RUN BUCKET              ~/runs/RUN to BUCKET/RUN
#   restore RUN BUCKET           and back, where the bucket has one and the run is not running
#   keep RUN BUCKET [SECONDS]    in the background: save every so often (60) until the run has ended
#
# Every command may be given again. --dry_run, first, prints what would be run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=0
[ "${1-}" != --dry_run ] || { dry_run=1; shift; }
fail() { echo "error: $*" >&2; exit 1; }
do_it() {
  if [ $dry_run = 1 ]; then printf '+'; printf ' %q' "$@"; echo; else "$@"; fi
}

command=${1-}
shift || true
if [[ $command =~ ^(start|supervise|status|follow|stop|save|restore|keep|keeper)$ ]]; then
  run=${1-}
  [[ $run =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "worker.sh $command: no name of a run: '$run'"
  shift
  workdir=$HOME/runs/$run
  own=$HOME/runs/.$run # Beside the run's directory, which is the program's.
fi
if [[ $command =~ ^(save|restore|keep|keeper)$ ]]; then
  [[ ${1-} == gs://?* ]] || fail "worker.sh $command: no bucket, gs://...: '${1-}'"
  bucket=${1%/}/$run
fi

alive() { # The process that a file names, unless it ended or belongs to an earlier boot.
  local pid boot
  read -r pid boot <"$1" 2>/dev/null || return 1
  [ "$boot" = "$(cat /proc/sys/kernel/random/boot_id)" ] && kill -0 "$pid" 2>/dev/null
}
in_background() { # FILE COMMAND...: FILE will name the process.
  local file=$1
  shift
  setsid nohup "$@" >>"$own.log" 2>&1 </dev/null &
  echo "$! $(cat /proc/sys/kernel/random/boot_id)" >"$file"
}
mirror() { # FROM TO [rsync's options]: what is half written stays behind.
  do_it gcloud storage rsync --recursive --exclude='.*orbax-checkpoint-tmp.*|.*\.deleting/.*|(.*/)?\.lock$' "$@"
}
save() {
  [ $dry_run = 1 ] || [ -e "$workdir/config.json" ] || return 0
  # Copied first and deleted then: the bucket holds a whole checkpoint at every moment.
  mirror "$workdir" "$bucket"
  mirror "$workdir" "$bucket" --delete-unmatched-destination-objects
}

case $command in
install)
  stamp=$root/.venv/installed
  want=$(sha256sum "$root/pyproject.toml")
  [ "$(cat "$stamp" 2>/dev/null)" != "$want" ] || { echo "installed already"; exit 0; }
  for version in 3.13 3.12 3.11 none; do
    command -v "python$version" >/dev/null && "python$version" -c 'import ensurepip' 2>/dev/null && break
  done
  if [ $version != none ]; then
    do_it "python$version" -m venv --clear "$root/.venv"
  else # TPU VM images have Python 3.10, which is too old.
    do_it env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv
    do_it python3 -m uv venv -q --seed --clear --python 3.12 "$root/.venv"
  fi
  do_it "$root/.venv/bin/python" -m pip install -q -e "$root[tpu]"
  [ $dry_run = 1 ] || echo "$want" >"$stamp"
  ;;
start)
  [ "${1-}" = -- ] || fail "worker.sh start RUN -- FLAGS"
  if alive "$own.pid"; then echo "$run is running already"; exit 0; fi
  [ $dry_run = 0 ] || { do_it cd "$root"; do_it "$root/.venv/bin/python" -m resnet_flax.main --distributed "--workdir=$workdir" "${@:2}"; exit 0; }
  [ -x "$root/.venv/bin/python" ] || fail "$root is not installed yet: worker.sh install"
  mkdir -p "$HOME/runs"
  rm -f "$own.status"
  in_background "$own.pid" bash "$root/launch/worker.sh" supervise "$run" "${@:2}"
  echo "$run started"
  ;;
supervise) # Not for hands: keeps the exit status.
  cd "$root"
  trap '[ -z "${child-}" ] || kill -TERM "$child"' TERM
  bash launch/forward.sh .venv/bin/python -m resnet_flax.main --distributed "--workdir=$workdir" "$@" &
  child=$!
  status=0
  while :; do
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  echo "$status" >"$own.status"
  ;;
status)
  if alive "$own.pid"; then
    echo running
  elif [ -e "$own.status" ]; then
    echo "ended $(cat "$own.status")"
  elif [ -e "$own.pid" ]; then
    echo died
  else
    echo absent
  fi
  ;;
follow)
  [ -e "$own.log" ] || fail "$run has not been started here"
  tail -n 100 -F "$own.log" --pid="$(cut -d' ' -f1 "$own.pid")"
  ;;
stop)
  alive "$own.pid" || { echo "$run is not running"; exit 0; }
  do_it kill -TERM "$(cut -d' ' -f1 "$own.pid")"
  while [ $dry_run = 0 ] && alive "$own.pid"; do sleep 0.2; done
  ;;
save) save ;;
restore)
  if alive "$own.pid"; then echo "$run is running: nothing restored"; exit 0; fi
  if [ $dry_run = 0 ]; then
    gcloud storage ls "$bucket/config.json" >/dev/null 2>&1 || { echo "nothing of $run in the bucket"; exit 0; }
    mkdir -p "$workdir"
  fi
  mirror "$bucket" "$workdir" --delete-unmatched-destination-objects
  ;;
keep)
  if alive "$own.keeper"; then exit 0; fi
  [ $dry_run = 0 ] || { echo "every ${2:-60} s:"; save; exit 0; }
  in_background "$own.keeper" bash "$root/launch/worker.sh" keeper "$run" "$1" "${2:-60}"
  ;;
keeper) # Not for hands: `keep`, in the background.
  trap 'true' TERM # A machine that goes down tells everybody at once: wait for the run's last save.
  while alive "$own.pid"; do
    sleep "$2" &
    wait $! || true
    save || echo "could not copy to $bucket; tried again in $2 s" >&2
  done
  save
  ;;
*)
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
