#!/bin/sh
# Run on every host of a TPU pod slice; JAX finds the other hosts by itself. From a workstation:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all \
#     --command 'cd jaxdiff && launch/tpu_pod.sh --config configs/mnist.py --workdir /shared/runs/mnist'
#
# The working directory must be one that all hosts see, on a file system that renames folders (NFS).
set -u
export JAXDIFF_DISTRIBUTED=auto
export JAXDIFF_HEARTBEAT_SECONDS="${JAXDIFF_HEARTBEAT_SECONDS:-60}"
exec jaxdiff train --restarts "${RESTARTS:-10}" --stall-timeout "${STALL:-1800}" "$@"
