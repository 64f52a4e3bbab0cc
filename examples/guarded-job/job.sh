#!/bin/sh
# A job that writes its result twice: once carelessly and once under guard. Run it under a lock:
#
#   tenure lock demo/report -- ./job.sh monday
#
# WORK=seconds is how long it pretends to work. With GO=file it works until that file exists, and tells its process id
# in file.pid; the demo uses that to pause it at the worst moment.
set -eu
worker=${1:?usage: job.sh WORKER}
: "${TENURE_LOCK:?run this job under: tenure lock NAME -- $0 $worker}"
tenure=${TENURE:-tenure}

echo "worker $worker: I hold $TENURE_LOCK under token $TENURE_TOKEN"
if [ -n "${GO:-}" ]; then
    echo $$ > "$GO.pid"
    until [ -e "$GO" ]; do sleep 0.05; done
else
    sleep "${WORK:-3}"
fi

# Nothing tells the store which owner this is: a late write lands on top of a newer owner's.
"$tenure" kv put report/careless "written by $worker" > /dev/null
echo "worker $worker: careless write done"

# The proof travels with the write, and is checked in the same commit.
code=0
"$tenure" kv put report/guarded "written by $worker" --require-lock "$TENURE_LOCK:$TENURE_TOKEN" > /dev/null || code=$?
if [ "$code" -ne 0 ]; then
    echo "worker $worker: guarded write refused, exit code $code"
    exit "$code"
fi
echo "worker $worker: guarded write done"
