#!/usr/bin/env bash
# Hold rules, alerts and dashboard against a real Prometheus that scrapes a real service, in trouble and under load
# (about two minutes).
# Prometheus is Debian's package, unpacked into the cache, not installed. Wants Debian or a child of it; no root.
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/lvm-prometheus-check
BIN=$CACHE/root/usr/bin

if [[ ! -x $BIN/promtool ]]; then
    echo "== fetching prometheus" >&2
    mkdir -p "$CACHE"
    (
        cd "$CACHE"
        apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }
        dpkg-deb -x prometheus_*.deb root
        rm -f prometheus_*.deb
    )
fi
"$BIN/promtool" check config docker/prometheus/prometheus.yml
"$BIN/promtool" test rules docker/prometheus/{rules,budgets}_test.yml
exec .venv/bin/python -m tests.docker.prometheus_check "$BIN"
