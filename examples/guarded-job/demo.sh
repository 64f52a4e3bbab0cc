#!/bin/sh
# Two workers, one lock, and a freeze at the worst moment. Needs `tenure` on the PATH (or TENURE=/path/to/tenure);
# starts a server of its own on 127.0.0.1:$PORT with data in a temporary folder, and removes both at the end.
set -eu
TENURE=${TENURE:-tenure}
TENURE_ENDPOINTS=127.0.0.1:${PORT:-23790}
export TENURE TENURE_ENDPOINTS
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
server='' supervisor=''

cleanup() {
    for pid in $supervisor $server; do
        kill -s CONT "$pid" 2> /dev/null || true
        kill "$pid" 2> /dev/null || true
    done
    wait 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

say() { printf '\n== %s\n' "$*"; }
wait_for() {
    tries=0
    until "$@" > /dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || { echo "gave up waiting for: $*" >&2; exit 1; }
        sleep 0.05
    done
}

"$TENURE" serve --listen "$TENURE_ENDPOINTS" --data-dir "$work/data" --log-level warn &
server=$!
wait_for "$TENURE" kv put demo/ready yes

say 'Worker A takes the lock and starts to work'
GO="$work/go" "$TENURE" lock demo/report --ttl 2s -- "$here/job.sh" A &
supervisor=$!
wait_for test -s "$work/go.pid"
job=$(cat "$work/go.pid")

say 'The machine of A freezes: supervisor and job stand still, nobody renews the lease'
kill -s STOP "$supervisor"
kill -s STOP -- "-$job"

say 'Worker B waits for the lock, gets it when the lease of A has ended, and finishes'
WORK=0 "$TENURE" lock demo/report --ttl 2s --wait 30s -- "$here/job.sh" B

say 'A wakes up. Its job gets to run for a moment before its supervisor does'
touch "$work/go"
kill -s CONT -- "-$job"
# The shell of the job is a child of the supervisor: it is over when it is a zombie, which waits to be collected.
wait_for sh -c "grep -qs '^State:.Z' /proc/$job/status || ! test -e /proc/$job"
kill -s CONT "$supervisor"
code=0
wait "$supervisor" || code=$?
supervisor=''
echo "the supervisor of A: exit code $code"

say 'What is in the store'
printf 'careless: '
"$TENURE" kv get report/careless
printf 'guarded:  '
"$TENURE" kv get report/guarded
echo 'B was the last owner. The careless value is the damage; the guarded one is right.'
