#!/bin/sh
# Two processes on this machine, the smallest real job: each sees two simulated CPU devices unless XLA_FLAGS says
# otherwise. Arguments are those of `jaxdiff train`:
#
#   launch/two_processes.sh --config configs/digits.py --workdir runs/two --restarts 5
#
# SIGTERM and Ctrl-C go to both: they save at one step and end with status 0.
set -u
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES=2
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=2}"
export JAXDIFF_HEARTBEAT_SECONDS="${JAXDIFF_HEARTBEAT_SECONDS:-10}"

first= second= told=
trap 'told=1; kill -TERM $first $second 2>/dev/null' TERM INT
JAX_PROCESS_ID=0 jaxdiff train "$@" & first=$!
JAX_PROCESS_ID=1 jaxdiff train "$@" & second=$!
[ -z "$told" ] || kill -TERM $first $second 2>/dev/null  # it came between the two

# wait returns early, with 128 + its number, when a signal is trapped: then wait again, for the process's own status
status=0
for child in $first $second; do
    while :; do
        told=
        wait $child
        code=$?
        [ -n "$told" ] && [ $code -gt 128 ] || break
    done
    [ $code -eq 0 ] || status=$code
done
exit $status
