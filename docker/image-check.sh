#!/usr/bin/env bash
# Build the image for real and call the service in it. Wants Debian or a child of it, and root; no container engine.
# The base image is made once, of the machine's own package mirror, and kept in the cache.
#   IMAGE_CHECK_PORT=N      port to serve on instead of a free one
#   IMAGE_CHECK_RUNTIME=... the build argument RUNTIME: cpu (default) or cuda
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/lvm-image-check
RUNTIME=${IMAGE_CHECK_RUNTIME:-cpu}
IMAGE=localhost/lvm-serve:check-$$
CONTAINER=lvm-serve-check-$$
CONTEXT=examples/context.json
export BUILDAH_ISOLATION=chroot

say() { printf '== %s\n' "$*"; }
fail() { printf 'image-check: %s\n' "$*" >&2; exit 1; }
buildah() { # vfs and chroot work wherever there is a root, inside other containers too
    command buildah --storage-driver vfs --root "$CACHE/storage" --runroot "$CACHE/run" "$@"
}

install_tools() {
    local missing=() tool
    for tool in buildah debootstrap; do
        type -P "$tool" >/dev/null || missing+=("$tool") # a program: buildah is a function here, too
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Debian with Python and nothing else; the mirror is the one that this machine's apt uses for its own release.
make_base() {
    buildah inspect --type image "$BASE" >/dev/null 2>&1 && return
    local mirror root container
    # shellcheck disable=SC2016  # apt's own placeholders
    mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v want="$RELEASE" '$1 == want && $2 == "main" { print $3; exit }')
    [[ -n $mirror ]] || fail "apt knows no mirror of $RELEASE main"
    say "making the base image of $RELEASE"
    root=$(mktemp -d "$CACHE/base.XXXXXX")
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$RELEASE" "$root" "$mirror" \
        >"$CACHE/debootstrap.log" 2>&1 || fail "debootstrap failed: see $CACHE/debootstrap.log"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
    container=$(buildah from scratch)
    buildah add -q "$container" "$root" / >/dev/null
    buildah commit -q "$container" "$BASE" >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$root"
}

# What pip is told on this machine, the build is told too: as a pip.conf (a build secret, so in no layer), and
# the local directories and certificates that it names as read-only mounts.
pip_settings() {
    python3 -m pip config list 2>/dev/null |
        sed -nE "s/^(global|install|:env:)\.([a-z-]+)='(.*)'\$/\1 \2 \3/p" |
        awk '{ key = $2; env = $1 == ":env:"; $1 = $2 = ""
               if (env || !(key in from_env)) value[key] = $0
               if (env) from_env[key] = 1 }
             END { print "[global]"; for (key in value) print key " =" value[key] }'
}

pip_mounts() {
    local word
    tr ' ' '\n' <"$1" | while read -r word; do
        case $word in
            file:///*) word=$(dirname "${word#file://}") ;; # an index keeps its files beside it
            /*) ;;
            *) continue ;;
        esac
        if [[ -e $word ]]; then printf '%s\n' "--volume=$word:$word:ro"; fi
    done | sort -u
}

build() {
    local mounts began=$SECONDS
    pip_settings >"$WORK/pip.conf"
    mapfile -t mounts < <(pip_mounts "$WORK/pip.conf")
    say "building with RUNTIME=$RUNTIME"
    buildah bud --force-rm --format docker --pull-never --layers=false \
        --build-arg "BASE=$BASE" --build-arg "RUNTIME=$RUNTIME" \
        --secret "id=pip,src=$WORK/pip.conf" "${mounts[@]}" \
        -f docker/Dockerfile -t "$IMAGE" . >"$WORK/build.log" 2>&1 || { tail -n 40 "$WORK/build.log" >&2; fail "the build failed"; }
    say "built in $((SECONDS - began)) s"
}

# Print, one argument a line, what the image is configured to run: entrypoint, or its health check.
configured() {
    buildah inspect --type image "$IMAGE" | python3 -c '
import json, sys
config = json.load(sys.stdin)["Docker"]["config"]
lines = {
    "serve": lambda: config["Entrypoint"] + config["Cmd"],
    "health": lambda: config["Healthcheck"]["Test"][1:],
    "user": lambda: [config["User"]],
    "volumes": lambda: list(config["Volumes"]),
}[sys.argv[1]]()
print("\n".join(lines))' "$1"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
    local command
    mapfile -t command < <(configured serve)
    buildah from -q --pull-never --name "$CONTAINER" "$IMAGE" >/dev/null
    ROOT=$(buildah mount "$CONTAINER")
    touch "$WORK/started"
    sleep 1 # so that what the service writes is newer by any clock
    buildah run --env "LVM_PORT=$PORT" "$CONTAINER" -- "${command[@]}" >"$WORK/serve.log" 2>&1 && fail "serves without a token"
    grep -q "Set LVM_TOKENS" "$WORK/serve.log" || fail "without a token: $(tail -n 3 "$WORK/serve.log")"
    buildah run --env "LVM_PORT=$PORT" --env "LVM_TOKENS=image-check:$TOKEN" "$CONTAINER" -- \
        "${command[@]}" >"$WORK/serve.log" 2>&1 &
    RUNNER=$!
}

# The service is the one process of the image's user that has no child: above it stand the runner's own.
service_pid() {
    local pid=$1 child children
    children=$(cat "/proc/$pid/task/"*/children 2>/dev/null || true)
    if [[ -z $children && $(awk '/^Uid:/ { print $2 }' "/proc/$pid/status" 2>/dev/null) == 10001 ]]; then
        echo "$pid"
    fi
    for child in $children; do
        service_pid "$child"
    done
}

call() { # PATH [FILE to post]
    LVM_TOKEN=$TOKEN python3 - "http://127.0.0.1:$PORT$1" "${2:-}" <<'PY'
import os, sys, urllib.request

url, body = sys.argv[1:]
data = open(body, "rb").read() if body else None
token = {"Authorization": f"Bearer {os.environ['LVM_TOKEN']}"}
request = urllib.request.Request(url, data, {"Content-Type": "application/json", **token} if body else {})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open(request, timeout=5).read().decode())
PY
}

wait_until_ready() {
    local began=$SECONDS
    until call /readyz >/dev/null 2>&1; do
        kill -0 "$RUNNER" 2>/dev/null || fail "the service died: $(tail -n 5 "$WORK/serve.log")"
        ((SECONDS - began < 60)) || fail "not ready within 60 s: $(tail -n 5 "$WORK/serve.log")"
        sleep 0.1
    done
}

check_answer() {
    call /predict "$CONTEXT" | python3 -c '
import json, math, sys
context = json.load(open(sys.argv[1]))["context"]
answer = json.load(sys.stdin)
vector = answer["vector"]
length = math.sqrt(math.fsum(x * x for x in vector))
assert len(vector) == len(context[0]), f"{len(vector)} floats for a context of {len(context[0])}"
assert abs(length - 1) < 1e-3, f"length {length}"
assert answer["served_by"] == "primary", answer["served_by"]
model, version = answer["model"], answer["version"]
print(f"== /predict: {len(vector)} floats of length {length:.6f} by primary, {model} {version}")' "$CONTEXT"
}

check_health() {
    local command
    mapfile -t command < <(configured health)
    [[ ${command[0]} == /* ]] || fail "the health check wants a shell: ${command[*]}"
    buildah run --env "LVM_PORT=$1" "$CONTAINER" -- "${command[@]}" >/dev/null 2>&1
}

# The volume is the user's: it may promote in it.
check_promote() {
    local version
    version=$(basename "$(readlink artifacts/lvm/primary)")
    buildah run "$CONTAINER" -- /venv/bin/lvm promote primary "$version" --why image-check
}

check_stop() {
    local status=0 pid
    pid=$(service_pid "$RUNNER")
    [[ -n $pid ]] || fail "no process of uid 10001"
    kill -TERM "$pid"
    timeout 40 tail --pid="$pid" -f /dev/null || fail "still there 40 s after SIGTERM"
    wait "$RUNNER" || status=$?
    RUNNER=
    ((status == 0)) || fail "exit status $status after SIGTERM: $(tail -n 5 "$WORK/serve.log")"
}

# A read-only root must do: nothing but temporary files may have been written.
check_untouched() {
    local written
    written=$(find "$ROOT" -xdev -newer "$WORK/started" -type f \
        -not -path "$ROOT/tmp/*" -not -path "$ROOT/run/*" -not -path "$ROOT/etc/*" -not -path "$ROOT/dev/*" -printf '/%P\n')
    [[ -z $written ]] || fail "the service wrote to the root file system: $written"
}

report_size() {
    buildah images --format '{{.Size}}' "$IMAGE" | sed 's/^/== image size: /'
    du -sh --apparent-size "$ROOT/venv" "$ROOT/models" | awk -v root="$ROOT" '{ sub(root, "", $2); print "==   " $2 ": " $1 }'
}

clean_up() {
    local status=$? pid
    trap - EXIT
    if [[ -n ${RUNNER:-} ]]; then
        pid=$(service_pid "$RUNNER")
        kill -KILL ${pid:+"$pid"} "$RUNNER" 2>/dev/null || true
    fi
    buildah umount "$CONTAINER" >/dev/null 2>&1 || true
    buildah rm "$CONTAINER" >/dev/null 2>&1 || true
    buildah rmi --force "$IMAGE" >/dev/null 2>&1 || true
    rm -rf "$WORK"
    exit "$status"
}

((EUID == 0)) || fail "wants root"
# shellcheck source=/dev/null
RELEASE=$(. /etc/os-release && echo "$VERSION_CODENAME")
BASE=localhost/lvm-base:$RELEASE
[[ -f $CONTEXT ]] || fail "$CONTEXT is missing"
[[ -e artifacts/lvm/primary ]] || fail "artifacts/lvm has no primary"
install_tools
mkdir -p "$CACHE"
WORK=$(mktemp -d)
trap clean_up EXIT
PORT=${IMAGE_CHECK_PORT:-$(free_port)}
TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')

make_base
build
[[ $(configured user) == 10001:10001 ]] || fail "runs as $(configured user)"
[[ $(configured volumes) == /models ]] || fail "volumes: $(configured volumes)"
start
wait_until_ready
say "ready on port $PORT as uid 10001"
check_answer
check_health "$PORT" || fail "the health check fails on a service that is ready"
! check_health 1 || fail "the health check passes where nothing listens"
check_promote >"$WORK/promote.log" 2>&1 || fail "lvm promote: $(tail -n 3 "$WORK/promote.log")"
check_stop
say "SIGTERM: exit 0"
check_untouched
report_size
say "image-check passed"
