#!/usr/bin/env bash
# local.sh N [--dry_run] FLAGS...: one training run in N processes on this machine.
#
# FLAGS are those of `python -m resnet_flax.main`. Lines of output begin with the process's number.
# SIGTERM and Ctrl-C go to every process, which save and end (a second one kills them). Where a
# process fails the others are ended too. Exit status: that of the first failure; 143 or 130 where
# the run was told to stop; else 0. Environment: PYTHON, the interpreter; GRACE, seconds that the
# others have to end after a failure.
set -u
usage() { echo "usage: local.sh N [--dry_run] FLAGS of resnet_flax.main" >&2; exit 2; }

[[ ${1-} =~ ^[1-9][0-9]*$ ]] || usage
number=$1
shift
dry_run=0
flags=()
for flag in "$@"; do
  if [ "$flag" = --dry_run ]; then dry_run=1; else flags+=("$flag"); fi
done
python=${PYTHON:-python}
command -v "$python" >/dev/null || {
  echo "error: no $python on PATH; activate the project's environment or set PYTHON" >&2
  exit 1
}
port=$("$python" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')

pids=()
stopped=0
pass_on() {
  local signal=TERM
  [ "$stopped" = 0 ] || signal=KILL
  stopped=$1
  kill -"$signal" "${pids[@]}" 2>/dev/null
}
trap 'pass_on 143' TERM
trap 'pass_on 130' INT

for ((i = 0; i < number; i++)); do
  process=("$python" -m resnet_flax.main --distributed "--coordinator=127.0.0.1:$port"
    "--num_processes=$number" "--process_id=$i" "${flags[@]+"${flags[@]}"}")
  if [ $dry_run = 1 ]; then
    printf '%q ' "${process[@]}"
    echo
    continue
  fi
  "${process[@]}" > >(trap '' INT TERM; sed -u "s/^/[$i] /") 2>&1 </dev/null &
  pids+=($!)
done
[ $dry_run = 0 ] || exit 0

status=0
deadline=0
running=("${pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    if [ $code != 0 ] && [ $status = 0 ]; then
      status=$code
      deadline=$((SECONDS + ${GRACE:-10}))
      kill -TERM "${pids[@]}" 2>/dev/null
    fi
  done
  # Waiting for the one that failed, the others may hear no signal.
  if [ $status != 0 ] && [ $SECONDS -ge $deadline ]; then kill -KILL "${pids[@]}" 2>/dev/null; fi
  running=("${left[@]+"${left[@]}"}")
  # In the background, so that a signal is passed on at once.
  [ ${#running[@]} = 0 ] || { sleep 0.2 & wait $!; }
done
[ $status != 0 ] || status=$stopped
sleep 0.1 # The last lines of output are still on their way.
exit "$status"
