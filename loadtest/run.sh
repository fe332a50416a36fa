#!/usr/bin/env bash
# Start a service on a free port, run locust and the open-loop driver against it, stop it.
# usage: loadtest/run.sh [REPORT_DIR]      RATE, SECONDS_EACH and USERS come from the environment
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin report=${1:-runs/load}
rate=${RATE:-300} seconds=${SECONDS_EACH:-15} users=${USERS:-16}
mkdir -p "$report"

"$bin/lvm" serve --port 0 2> "$report/serve.log" &
server=$!
trap 'kill -TERM $server 2> /dev/null; wait $server || true' EXIT
for _ in $(seq 300); do
  url=$(sed -nE 's/.*"listening".*/&/; s/.*"url": "([^"]+)".*/\1/p' "$report/serve.log" | tail -1)
  [ -n "$url" ] && break
  kill -0 $server || { cat "$report/serve.log" >&2; exit 1; }
  sleep 0.1
done
echo "serving on ${url:?no address in $report/serve.log}" >&2

echo "== locust, closed loop, $users users" >&2
"$bin/locust" -f loadtest/locustfile.py --headless --only-summary -H "$url" \
  -u "$users" -r "$users" -t "${seconds}s" --html "$report/locust.html"
for wire in octet json; do
  echo "== open loop, $wire, $rate/s" >&2
  "$bin/python" -m loadtest --url "$url" --rate "$rate" --seconds "$seconds" --wire $wire \
    --warmup 1 --report "$report/$wire"
done
echo "== open loop, /retrieve, json, $((rate / 3))/s" >&2
"$bin/python" -m loadtest --url "$url" --route retrieve --rate $((rate / 3)) --seconds "$seconds" --wire json \
  --warmup 1 --report "$report/retrieve"
echo "reports in $report" >&2
