#!/usr/bin/env bash
# forward.sh COMMAND...: runs a command and passes SIGTERM and SIGINT on to it, as SIGTERM.
#
# The training program saves and ends with status 0 when it is told to stop. Whoever restarts it
# must tell that from the end of the run: told to stop, this ends with 143 (SIGTERM) or 130 (SIGINT).
set -u
[ $# -gt 0 ] || { echo "usage: forward.sh COMMAND..." >&2; exit 2; }

stopped=0
pass_on() {
  stopped=$1
  kill -TERM "$child" 2>/dev/null
}
trap 'pass_on 143' TERM
trap 'pass_on 130' INT

"$@" &
child=$!
while :; do
  wait "$child"
  status=$?
  # A signal interrupts the wait, not the command.
  kill -0 "$child" 2>/dev/null || break
done
[ "$stopped" = 0 ] || status=$stopped
exit "$status"
