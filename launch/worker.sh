#!/usr/bin/env bash
# What tpu_vm.sh does on each worker of a TPU VM, in ~/dllm_jax there. One job at a time: its files are in .job.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
cd "$root"

usage() {
    cat <<'USAGE'
usage: launch/worker.sh VERB [--bucket=gs://BUCKET/FOLDER] [--every=SECONDS] [--dry-run] [-- COMMAND ...]

  install  Python 3.12, JAX for TPUs and this package into .venv
  start    run COMMAND in the background; nothing if it runs already
  follow   its output from its start on, until it ends
  wait     until it has ended and its outputs are saved
  status   one line: none, running, or ended and its exit code
  stop     SIGTERM: it finishes its batch, writes and ends

  --bucket=gs://BUCKET/FOLDER  start: every worker's folder out is kept there, and comes from there if it is not here
  --every=SECONDS              start: how often (default: 300), and once more when the command has ended
  --dry-run                    print what would run, and run nothing
  --help                       print this
USAGE
}

verb="" bucket="" every=300
while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit ;;
    --dry-run) dry_run=1 ;;
    --bucket=*) bucket=${1#*=} ;;
    --every=*) every=${1#*=} ;;
    --) shift && break ;;
    -*) fail "$1: unknown option (see --help)" ;;
    *)
        [ -z "$verb" ] || fail "expected one verb, got $verb and $1 (see --help)"
        verb=$1
        ;;
    esac
    shift
done

# state: none, running, or ended CODE (137: without a trace of how).
state() {
    if [ ! -e .job/pid ]; then
        echo none
    elif [ -e .job/code ]; then
        echo "ended $(cat .job/code)"
    elif kill -0 "$(cat .job/pid)" 2>/dev/null; then
        echo running
    else
        echo "ended 137"
    fi
}

# snapshot: the object that this worker's out is kept in. Every worker has its own, whichever of them writes what.
snapshot() {
    local number
    number=$(curl -sf -H 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
    echo "$bucket/worker-$number.tar"
}

# restore: out from the bucket, unless this machine has one or the bucket has none yet. Other failures are errors: going
# on without what is there would overwrite it.
restore() {
    local from
    if [ -n "$bucket" ] && [ ! -d out ]; then
        from=$(snapshot)
        if gcloud storage cp "$from" .job/out.tar 2>.job/errors; then
            tar -xf .job/out.tar
        elif ! grep -q "matched no objects" .job/errors; then
            cat .job/errors >&2
            exit 1
        fi
    fi
    mkdir -p out
}

# save: out to the bucket, as `kill -9` would leave it: the command stands still while it is read. An object appears as
# a whole or not at all, so a machine that is taken away meanwhile leaves the one before.
save() {
    [ -n "$bucket" ] || return 0
    pkill -STOP --parent "$starter" || true
    tar -cf .job/out.tar out || true
    pkill -CONT --parent "$starter" || true
    gcloud storage cp .job/out.tar "$(snapshot)" || note "not saved to $bucket; the next try is in $every seconds"
}

case $verb in
install)
    uv=$HOME/.local/bin/uv # the Python of TPU VMs is older than what this package needs; uv brings one
    run python3 -m pip install --user --quiet --upgrade uv
    run "$uv" venv --allow-existing --python 3.12 .venv
    run "$uv" pip install --python .venv/bin/python -e '.[tpu,train,viz]'
    run sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' || note "no huge pages: slower starts"
    ;;
start)
    [ $# -gt 0 ] || fail "start: expected -- COMMAND"
    if [ -n "$dry_run" ]; then
        run launch/start.sh tpu "$@"
        exit
    fi
    if [ "$(state)" = running ]; then
        [ "$(quoted "$@")" = "$(cat .job/command)" ] || fail "start: expected no job, got $(cat .job/command) (see stop)"
        exit
    fi
    mkdir -p .job
    rm -f .job/code .job/pid
    restore
    quoted "$@" >.job/command
    touch out/job.log
    wc -l <out/job.log >.job/lines
    setsid nohup launch/worker.sh job --bucket="$bucket" --every="$every" -- "$@" >>out/job.log 2>&1 </dev/null &
    echo $! >.job/pid
    ;;
job) # internal: what start puts into the background
    launch/start.sh tpu "$@" &
    starter=$!
    trap 'kill -TERM "$starter"' TERM
    saved=$SECONDS
    while kill -0 "$starter" 2>/dev/null; do
        sleep 1 || true
        if ((SECONDS - saved >= every)); then
            save
            saved=$SECONDS
        fi
    done
    code=0
    wait "$starter" || code=$?
    save
    echo "$code" >.job/code
    ;;
follow)
    if [ -n "$dry_run" ]; then
        run tail -F out/job.log
        exit
    fi
    [ -e .job/pid ] || fail "follow: expected a job, got none (see start)"
    tail -n "+$(($(cat .job/lines) + 1))" -F --pid="$(cat .job/pid)" out/job.log 2>/dev/null
    ;;
wait) while [ "$(state)" = running ]; do sleep 1; done ;;
status) state ;;
stop)
    [ "$(state)" = running ] || fail "stop: expected a job that runs, got $(state)"
    run kill -TERM "$(cat .job/pid)"
    ;;
*) fail "expected a verb, got ${verb:-nothing} (see --help)" ;;
esac
