#!/usr/bin/env bash
# Runs one process of a job: on a TPU VM, in a container, as a task of Slurm.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

usage() {
    cat <<'USAGE'
usage: launch/start.sh [--dry-run] PLATFORM COMMAND [ARGUMENT ...]

  launch/start.sh tpu python -m decode.run --config=configs/apd.py

Runs COMMAND in this clone (with its .venv, if there is one) and the flags that launch/flags.env has for PLATFORM, which
is tpu or gpu. SIGTERM and SIGINT are passed on, once. The exit code is the command's; but 143 if it ended with 0 after
SIGTERM: it stopped early, wrote what it had, and whoever stopped it should start it again.

  --dry-run  print what would run, with its environment, and run nothing
  --help     print this
USAGE
}

while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit ;;
    --dry-run) dry_run=1 ;;
    -*) fail "$1: unknown option (see --help)" ;;
    *) break ;;
    esac
    shift
done
[ $# -ge 2 ] || fail "start.sh: expected a platform and a command (see --help)"
PLATFORM=$1
shift
# shellcheck source=launch/flags.env
. "$root/launch/flags.env"

command=(env)
for flag in "${FLAGS[@]}"; do
    name=${flag%%=*}
    [ -n "${!name+set}" ] || command+=("$flag")
done
command+=("$@")

cd "$root"
[ ! -d .venv ] || export PATH="$root/.venv/bin:$PATH"
if [ -n "$dry_run" ]; then
    run "${command[@]}"
    exit
fi

# pass_on SIGNAL: to the command, the first time.
# shellcheck disable=SC2329 # called by traps
pass_on() {
    trap '' TERM INT
    [ "$1" = INT ] || stopped=1
    kill -s "$1" "$child" 2>/dev/null || true
}

stopped=""
set -m # a process group of its own: Slurm signals ours, and the command must not be signalled twice
"${command[@]}" &
child=$!
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
    code=0
    wait "$child" || code=$?
done
[ -z "$stopped" ] || [ "$code" -ne 0 ] || code=143
exit "$code"
