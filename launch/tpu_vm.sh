#!/usr/bin/env bash
# A TPU VM, or a slice of several, from the queue to its deletion. launch/README.md shows the whole way.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

usage() {
    cat <<'USAGE'
usage: launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [--OPTION=VALUE ...] [-- ARGUMENT ...]

  create   queue the machine and wait until it is there
  install  copy the last commit of this clone to ~/dllm_jax on every worker and install it
  push     copy files into ~/dllm_jax on every worker: -- FILE ...
  each     run something on every worker and wait for it: -- COMMAND ...
  run      start a job on every worker, in the background, and follow it: -- COMMAND ...
  logs     follow the job again, after the connection broke or Ctrl-C
  stop     let the job finish its batch, write and end
  fetch    copy ~/dllm_jax/out of worker 0 into --to
  delete   give the machine back: it is paid for until then
  all      create, install, run, fetch, delete; if a spot machine is taken away, the same again with another

  --name=NAME       of the machine and of its request
  --zone=ZONE       where: cloud.google.com/tpu/docs/regions-zones
  --project=ID      default: gcloud's
  --type=TYPE       default: v5litepod-8 (v5e, one worker, eight chips)
  --runtime=NAME    software of the machine; default: the one for the type
  --spot            create, all: cheaper, and may be taken away at any time
  --bucket=gs://BUCKET/FOLDER  run, all: keep every worker's out there, so that another machine can go on from it
  --every=SECONDS   run, all: how often; default: 300
  --to=FOLDER       fetch, all: default: the working directory
  --keep            all: do not delete the machine
  --poll=SECONDS    between two looks at a machine; default: 20
  --dry-run         print every command that would run, and run none
  --help            print this

The exit code of run, logs and all is the job's; 75 if the machine was taken away.
USAGE
}

# runtime_of TYPE: cloud.google.com/tpu/docs/runtimes
runtime_of() {
    case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) fail "--runtime: expected the software of a $1, got none" ;;
    esac
}

verb="" name="" zone="" project="" type=v5litepod-8 runtime="" spot="" bucket="" every=300 to=. keep="" poll=20
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit ;;
    --dry-run) dry_run=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=1 ;;
    --bucket=*) bucket=${1#*=} ;;
    --every=*) every=${1#*=} ;;
    --to=*) to=${1#*=} ;;
    --keep) keep=1 ;;
    --poll=*) poll=${1#*=} ;;
    --) shift && break ;;
    -*) fail "$1: unknown option (see --help)" ;;
    *)
        [ -z "$verb" ] || fail "expected one verb, got $verb and $1 (arguments come behind --)"
        verb=$1
        ;;
    esac
    shift
done
[ -n "$name" ] || fail "--name: expected the name of the machine, got none"
[ -n "$zone" ] || fail "--zone: expected where the machine is, got none"
where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
[ -n "$runtime" ] || runtime=$(runtime_of "$type")
lost_code=75

# tpus ARGUMENT...: gcloud compute tpus, for this project and zone.
tpus() { run gcloud compute tpus "$@" "${where[@]}"; }

# on WORKER COMMAND...: in the clone there. WORKER is a number or `all`. A machine that is gone is noticed in 90 seconds.
on() {
    local worker=$1
    shift
    tpus tpu-vm ssh "$name" --worker="$worker" --ssh-flag=-oServerAliveInterval=30 \
        --command="cd dllm_jax && $(quoted "$@")"
}

# machine_state: as cloud.google.com/tpu/docs/queued-resources lists them; nothing if there is none, or gcloud cannot tell.
machine_state() {
    gcloud compute tpus queued-resources describe "$name" --format='value(state.state)' "${where[@]}" 2>/dev/null || true
}

# is_lost: a machine that was there is not any more, and its request has to be deleted.
is_lost() {
    [ -z "$dry_run" ] || return 1
    case $(machine_state) in SUSPENDING | SUSPENDED | DELETING) ;; *) return 1 ;; esac
}

create() {
    local state=""
    local request=(queued-resources create "$name" --node-id="$name" --accelerator-type="$type")
    request+=(--runtime-version="$runtime")
    [ -z "$spot" ] || request+=(--spot)
    [ -n "$dry_run" ] || state=$(machine_state)
    [ -n "$state" ] || tpus "${request[@]}" || return
    if [ -n "$dry_run" ]; then
        tpus queued-resources describe "$name" --format='value(state.state)'
        return
    fi
    while state=$(machine_state) && [ "$state" != ACTIVE ]; do
        case $state in
        SUSPENDING | SUSPENDED | FAILED | DELETING) note "$name is $state: delete it, then create it" && return 1 ;;
        esac
        note "$name: ${state:-unknown}, looking again in $poll seconds"
        sleep "$poll"
    done
}

install() {
    local archive="${TMPDIR:-/tmp}/dllm_jax-$name.tar.gz"
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
        tpus tpu-vm scp "$archive" "$name:dllm_jax.tar.gz" --worker=all &&
        tpus tpu-vm ssh "$name" --worker=all --command="mkdir -p dllm_jax && tar -xzf dllm_jax.tar.gz -C dllm_jax" &&
        on all launch/worker.sh install
}

# follow: worker 0's output; returns the job's exit code, or that of a lost machine. A broken connection is made again.
follow() {
    local answer
    while :; do
        on 0 launch/worker.sh follow || true
        if [ -n "$dry_run" ]; then
            on 0 launch/worker.sh status
            on all launch/worker.sh wait
            return
        fi
        answer=$(on 0 launch/worker.sh status) || answer=""
        case $answer in
        "ended "*)
            on all launch/worker.sh wait || true # the others end a little later
            return "${answer#ended }"
            ;;
        none) fail "logs: expected a job, got none (see run)" ;;
        esac
        if is_lost; then
            note "$name was taken away; what reached --bucket is there"
            return "$lost_code"
        fi
        [ -n "$answer" ] || note "$name does not answer, trying again in $poll seconds"
        sleep "$poll"
    done
}

start() {
    local options=()
    [ -z "$bucket" ] || options=(--bucket="$bucket" --every="$every")
    on all launch/worker.sh start ${options[@]+"${options[@]}"} -- "$@" && follow
}

fetch() {
    run mkdir -p "$to" && tpus tpu-vm scp "$name:dllm_jax/out" "$to" --recurse --worker=0
}

delete() {
    while [ -z "$dry_run" ] && [ "$(machine_state)" = SUSPENDING ]; do sleep "$poll"; done # cannot be deleted yet
    tpus queued-resources delete "$name" --force --quiet
}

still_there() {
    [ -n "$dry_run" ] || note "perhaps still there, and paid for: launch/tpu_vm.sh delete $(quoted --name="$name" "${where[@]}")"
}

[ "$verb" != all ] || [ -z "$spot" ] || [ -n "$bucket" ] ||
    fail "--bucket: expected where a spot machine's outputs survive it, got none"
case $verb in
push | each | run | all) [ $# -gt 0 ] || fail "$verb: expected arguments behind --, got none" ;;
*) [ $# -eq 0 ] || fail "$verb: expected no arguments, got $1" ;;
esac
case $verb in
create) create ;;
install) install ;;
push) tpus tpu-vm scp "$@" "$name:dllm_jax/" --recurse --worker=all ;;
each) on all launch/start.sh tpu "$@" ;;
run)
    trap 'note "following ended; the job goes on (see logs, stop)"; still_there; exit 130' INT
    start "$@"
    ;;
logs) follow ;;
stop) on all launch/worker.sh stop ;;
fetch) fetch ;;
delete) delete ;;
all)
    trap still_there EXIT
    created=""
    while :; do
        code=0
        { create && created=1 && install && start "$@"; } || code=$?
        if [ "$code" -eq 0 ] || [ -z "$spot" ] || ! is_lost; then break; fi
        delete
    done
    [ -z "$created" ] || fetch || note "nothing fetched"
    [ -n "$keep" ] || { delete && trap - EXIT; } || true
    exit "$code"
    ;;
*) fail "expected a verb, got ${verb:-nothing} (see --help)" ;;
esac
