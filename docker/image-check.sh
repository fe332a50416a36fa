#!/usr/bin/env bash
# Build the image for real and call the service in it, locked down as in Kubernetes: process 1, a user without any
# capability, nothing writable but /tmp and /dev/shm. Wants Debian or a child of it, and root; no container engine.
# The base image is made once, of the machine's own package mirror, and kept in the cache.
#   IMAGE_CHECK_PORT=N      port to serve on instead of a free one
#   IMAGE_CHECK_RUNTIME=... the build argument RUNTIME: cpu (default) or cuda
#   IMAGE_CHECK_TEXT=1      the build argument TEXT: the encoder as well
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/lvm-image-check
RUNTIME=${IMAGE_CHECK_RUNTIME:-cpu}
TEXT=${IMAGE_CHECK_TEXT:-0}
LIMIT_MB=240 TEXT_MB=110 # of /venv on a CPU, and what text may add
IMAGE=localhost/lvm-serve:check-$$
CONTAINER=lvm-serve-check-$$
CONTEXT=examples/context.json
DRAIN_S=5 # long enough to look
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
    say "building with RUNTIME=$RUNTIME TEXT=$TEXT"
    buildah bud --force-rm --format docker --pull-never --layers=false \
        --build-arg "BASE=$BASE" --build-arg "RUNTIME=$RUNTIME" --build-arg "TEXT=$TEXT" \
        --secret "id=pip,src=$WORK/pip.conf" "${mounts[@]}" \
        -f docker/Dockerfile -t "$IMAGE" . >"$WORK/build.log" 2>&1 || { tail -n 40 "$WORK/build.log" >&2; fail "the build failed"; }
    say "built in $((SECONDS - began)) s"
}

# Print, one word a line, how the image is configured.
configured() {
    buildah inspect --type image "$IMAGE" | python3 -c '
import json, sys
config = json.load(sys.stdin)["Docker"]["config"]
lines = {
    "serve": lambda: config["Entrypoint"] + config["Cmd"],
    "health": lambda: config["Healthcheck"]["Test"][1:],
    "user": lambda: [config["User"]],
    "environment": lambda: config["Env"],
    "home": lambda: [config["WorkingDir"]],
    "volumes": lambda: list(config["Volumes"]),
}[sys.argv[1]]()
print("\n".join(lines))' "$1"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Run a command in the image as process 1 of a container with a root that cannot be written; so can the registry, but
# where MODELS=rw.
inside() { # [VARIABLE=VALUE...] -- COMMAND...
    local environment variables=()
    mapfile -t environment < <(configured environment)
    while [[ $1 != -- ]]; do variables+=("$1") && shift; done
    # shellcheck disable=SC2016  # the inner shell's
    ROOT=$ROOT MODELS=${MODELS:-ro} IDS=$(configured user) unshare --mount --pid --fork --kill-child -- bash -ec '
        mount --bind "$ROOT" "$ROOT"
        mount --bind "$ROOT/models" "$ROOT/models"
        mount -o remount,bind,ro "$ROOT"
        mount -o "remount,bind,$MODELS" "$ROOT/models"
        mount -t proc proc "$ROOT/proc"
        mount --rbind /sys "$ROOT/sys"
        mount --rbind /dev "$ROOT/dev"
        mount -t tmpfs -o size=64m,mode=1777,noexec,nosuid,nodev shm "$ROOT/dev/shm"
        mount -t tmpfs -o size=256m,mode=1777,noexec,nosuid,nodev tmp "$ROOT/tmp"
        exec chroot "$ROOT" setpriv --reuid="${IDS%:*}" --regid="${IDS#*:}" --clear-groups --no-new-privs \
            --bounding-set=-all --inh-caps=-all -- env -i "$@"' \
        inside --chdir="$(configured home)" PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "${environment[@]}" "LVM_PORT=$PORT" "${variables[@]}" "${@:2}"
}

check_lockdown() {
    # shellcheck disable=SC2016
    inside -- sh -c 'touch /tmp/it /dev/shm/it && ! touch /it 2>&1 && ! touch /models/it 2>&1 && [ $$ = 1 ] &&
        grep -q "CapEff:.0*$" /proc/self/status && grep -q "NoNewPrivs:.1" /proc/self/status' >/dev/null ||
        fail "the container is not locked down"
}

check_exposure() {
    local status=0 command
    mapfile -t command < <(configured serve)
    inside -- "${command[@]}" >"$WORK/serve.log" 2>&1 || status=$?
    ((status == 78)) || fail "exit status $status without a token, not 78: $(tail -n 3 "$WORK/serve.log")"
    grep -q "Set LVM_TOKENS" "$WORK/serve.log" || fail "without a token: $(tail -n 3 "$WORK/serve.log")"
    say "without a token: exit 78"
}

start() { # WORKERS
    local command
    mapfile -t command < <(configured serve)
    inside "LVM_TOKENS=image-check:$TOKEN" "LVM_WORKERS=$1" "LVM_DRAIN_S=$DRAIN_S" -- "${command[@]}" \
        >"$WORK/serve.log" 2>&1 &
    RUNNER=$!
}

# The service is process 1 of its namespace, somewhere below the runner.
service_pid() {
    local pid=$RUNNER
    until grep -qE '^NSpid:.*\s[0-9]+\s1$' "/proc/$pid/status" 2>/dev/null; do
        pid=$(pgrep --oldest --parent "$pid") || return 0
    done
    echo "$pid"
}

# Print the body, or, where there is an error, its status on stderr.
call() { # PATH [FILE to post]
    LVM_TOKEN=$TOKEN python3 - "http://127.0.0.1:$PORT$1" "${2:-}" <<'PY'
import os, sys, urllib.error, urllib.request

url, body = sys.argv[1:]
data = open(body, "rb").read() if body else None
token = {"Authorization": f"Bearer {os.environ['LVM_TOKEN']}"}
request = urllib.request.Request(url, data, {"Content-Type": "application/json", **token} if body else {})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    print(opener.open(request, timeout=5).read().decode())
except (urllib.error.HTTPError, OSError) as error:
    sys.exit(str(getattr(error, "code", error)))
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

check_health() { # PORT
    local command
    mapfile -t command < <(configured health)
    [[ ${command[0]} == /* ]] || fail "the health check wants a shell: ${command[*]}"
    inside "LVM_PORT=$1" -- "${command[@]}" >/dev/null 2>&1
}

check_smoke() {
    inside "LVM_TOKEN=$TOKEN" -- /venv/bin/lvm smoke "http://127.0.0.1:$PORT" >"$WORK/smoke.log" 2>&1 ||
        fail "lvm smoke: $(tail -n 20 "$WORK/smoke.log")"
}

check_text() {
    printf '{"text": "Do hares dig burrows?", "k": 1}' >"$WORK/text.json"
    call /retrieve "$WORK/text.json" >"$WORK/text.log" 2>&1 || true
    case $TEXT in
        1) grep -q '"read_as":"query"' "$WORK/text.log" || fail "text: $(cat "$WORK/text.log")" ;;
        *) [[ $(cat "$WORK/text.log") == 422 ]] || fail "text without an encoder: $(cat "$WORK/text.log")" ;;
    esac
}

# The volume is the user's: it may promote in it.
check_promote() {
    local version
    version=$(basename "$(readlink artifacts/lvm/primary)")
    MODELS=rw inside -- /venv/bin/lvm promote primary "$version" --why image-check
}

# At SIGTERM, first /readyz says so while requests are still answered, then all ends well.
check_stop() {
    local status=0 pid said= began=$SECONDS
    pid=$(service_pid)
    [[ $(awk '/^Uid:/ { print $2, $3, $4, $5 }' "/proc/$pid/status") == "10001 10001 10001 10001" ]] || fail "runs as another"
    kill -TERM "$pid"
    until [[ $said == 503 ]]; do
        ((SECONDS - began < DRAIN_S)) || fail "/readyz after SIGTERM: ${said:-200}"
        said=$(call /readyz 2>&1 >/dev/null || true)
    done
    call /predict "$CONTEXT" >/dev/null || fail "no answer in the drain"
    timeout 40 tail --pid="$pid" -f /dev/null || fail "still there 40 s after SIGTERM"
    wait "$RUNNER" || status=$?
    RUNNER=
    ((status == 0)) || fail "exit status $status after SIGTERM: $(tail -n 5 "$WORK/serve.log")"
    say "SIGTERM: 503 on /readyz, then exit 0"
}

check_size() {
    local site=("$ROOT"/venv/lib/python3*/site-packages) megabytes
    buildah images --format '{{.Size}}' "$IMAGE" | sed 's/^/== image size: /'
    { du -sm --apparent-size "$ROOT"/{usr,venv,models} && du -sm --apparent-size "${site[0]}"/* | sort -rn | awk "NR <= 8"; } |
        awk -v root="$ROOT" '{ sub(root, "", $2); print "==   " $1 " MB " $2 }'
    [[ $RUNTIME == cpu ]] || return 0
    [[ ! -e ${site[0]}/torch ]] || fail "torch is in the image"
    megabytes=$(du -sm --apparent-size "$ROOT/venv" | cut -f1)
    ((megabytes <= LIMIT_MB + TEXT * TEXT_MB)) || fail "/venv has $megabytes MB"
}

clean_up() {
    local status=$? pid
    trap - EXIT
    if [[ -n ${RUNNER:-} ]]; then
        pid=$(service_pid)
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
buildah from -q --pull-never --name "$CONTAINER" "$IMAGE" >/dev/null
ROOT=$(buildah mount "$CONTAINER")
check_size
check_lockdown
check_exposure
for workers in 1 2; do
    start "$workers"
    wait_until_ready
    say "ready on port $PORT as uid 10001 with $workers worker(s)"
    check_answer
    check_smoke
    check_text
    check_health "$PORT" || fail "the health check fails on a service that is ready"
    ! check_health 1 || fail "the health check passes where nothing listens"
    check_promote >"$WORK/promote.log" 2>&1 || fail "lvm promote: $(tail -n 3 "$WORK/promote.log")"
    check_stop
done
say "image-check passed"
