#!/usr/bin/env bash
# TPU slices on GKE with XPK (github.com/AI-Hypercomputer/xpk, `pip install xpk`); jobset.yaml is the same without it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

usage() {
    cat <<'USAGE'
usage: launch/gke/xpk.sh VERB --cluster=NAME --zone=ZONE --project=ID [--OPTION=VALUE ...] [-- COMMAND ...]

  cluster         make the cluster, with a slice of --type
  storage         make a disk that all workers share and that outlives them, at /dllm_jax/out
  run             queue a job on it: -- COMMAND ...
  list            the jobs and how they are
  wait            until the job ends; the exit code is 0 if it ended well
  delete          the job
  delete-storage  the disk and everything on it
  delete-cluster  the cluster: it is paid for until then

  --cluster=NAME  --zone=ZONE  --project=ID
  --type=TYPE      default: v5litepod-16 (v5e, 16 chips)
  --spot           cluster: cheaper, and may be taken away at any time
  --workload=NAME  run, wait, delete: of the job
  --image=IMAGE    run: the image of the target tpu of launch/Dockerfile, in a registry
  --storage=NAME   run, storage, delete-storage: of the disk
  --restarts=N     run: how often a job that was stopped or broke down is started again; default: 50
  --dry-run        print what would run, and run nothing
  --help           print this
USAGE
}

verb="" cluster="" zone="" project="" type=v5litepod-16 spot="" workload="" image="" storage="" restarts=50
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit ;;
    --dry-run) dry_run=1 ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --spot) spot=1 ;;
    --workload=*) workload=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --storage=*) storage=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --) shift && break ;;
    -*) fail "$1: unknown option (see --help)" ;;
    *)
        [ -z "$verb" ] || fail "expected one verb, got $verb and $1 (arguments come behind --)"
        verb=$1
        ;;
    esac
    shift
done

# needs OPTION...: the names of the variables that must be given.
needs() {
    local option
    for option in "$@"; do
        [ -n "${!option}" ] || fail "--$option: needed for $verb (see --help)"
    done
}

needs cluster zone project
where=(--cluster="$cluster" --zone="$zone" --project="$project")
case $verb in
cluster)
    capacity=--on-demand
    [ -z "$spot" ] || capacity=--spot
    run xpk cluster create "${where[@]}" --tpu-type="$type" --num-slices=1 "$capacity" --enable-gcpfilestore-csi-driver
    ;;
storage)
    needs storage
    run xpk storage create "$storage" "${where[@]}" --type=gcpfilestore --auto-mount=false --readonly=false \
        --mount-point=/dllm_jax/out --size=1024 --tier=BASIC_HDD --vol=default
    ;;
run)
    needs workload image
    [ $# -gt 0 ] || fail "run: expected -- COMMAND, got none"
    # XPK starts again what ended with a code above 126, as start.sh does after SIGTERM (`exec`, so that it gets it);
    # and with 1, which is how the processes end that lost another one.
    options=(--tpu-type="$type" --num-slices=1 --docker-image="$image")
    options+=(--max-restarts="$restarts" --restart-on-exit-codes=1)
    [ -z "$storage" ] || options+=(--storage="$storage")
    run xpk workload create "${where[@]}" --workload="$workload" "${options[@]}" \
        --command="exec launch/start.sh tpu $(quoted "$@")"
    ;;
list) run xpk workload list "${where[@]}" ;;
wait)
    needs workload
    run xpk workload list "${where[@]}" --wait-for-job-completion="$workload"
    ;;
delete)
    needs workload
    run xpk workload delete "${where[@]}" --workload="$workload"
    ;;
delete-storage)
    needs storage
    run xpk storage delete "$storage" "${where[@]}"
    ;;
delete-cluster) run xpk cluster delete "${where[@]}" ;;
*) fail "expected a verb, got ${verb:-nothing} (see --help)" ;;
esac
