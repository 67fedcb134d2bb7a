#!/usr/bin/env bash
# Starts one command on every host of a TPU pod slice, in this project's folder there.
#
#   TPU_NAME=my-pod ZONE=us-central2-b tools/tpu_pod.sh .venv/bin/python experiments/post_train.py \
#       --distributed --config=tabletop --workdir=/mnt/shared/runs/mine --set=mesh.data=8 --set=mesh.tensor=8
#
# TPU_NAME  the slice (required)        PROJECT  of Google Cloud; gcloud's default where it is not set
# ZONE      of the slice (required)     FOLDER   of the project on the hosts (worldenv_jax, below the home folder)
# WORKER    which hosts (all)
#
# The working tree must be on every host, with its packages (`make quickstart` sets them up), and --workdir on storage
# that all hosts share. Output of all hosts comes here; it ends with gcloud's exit code. Ctrl-C ends the session only:
# run it again with `pkill -f experiments/` to stop the hosts, and with the first command to resume.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

[ $# -gt 0 ] || fail "no command: TPU_NAME=... ZONE=... $0 COMMAND [ARGUMENT ...]"
[ -n "${TPU_NAME:-}" ] || fail "TPU_NAME is not set: the name of the slice, see gcloud compute tpus tpu-vm list"
[ -n "${ZONE:-}" ] || fail "ZONE is not set: the zone of $TPU_NAME"
command -v gcloud > /dev/null || fail "gcloud is not on the PATH: install the Google Cloud SDK and log in"

printf -v command '%q ' "$@"
printf -v folder '%q' "${FOLDER:-worldenv_jax}"
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} \
  --worker "${WORKER:-all}" --command "cd $folder && $command"
