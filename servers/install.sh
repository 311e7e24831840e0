#!/bin/sh
# Installs the real servers that the tests run against, and does nothing where all of them are there.
#
#   ./run servers            install what is missing
#   ./run servers --check    only say what is there and what is not (exit code 3 where something is missing)
#
# RabbitMQ, Prometheus, Alertmanager, Redis, PostgreSQL and MariaDB come from the distribution's packages (Debian, Ubuntu); none of
# them is started as a service. Jaeger and the collector are built with Go into a cache folder of the user's. Exit code: 0 all there,
# 2 wrong usage, 3 something is missing (it is named, with the line that installs it).
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cache="${XDG_CACHE_HOME:-${HOME:?the cache folder is found by HOME}/.cache}/meshkit/servers"
jaeger_module=github.com/jaegertracing/jaeger/cmd/all-in-one@v1.42.0
builder_module=go.opentelemetry.io/collector/cmd/builder@v0.159.0

# Debian puts daemons where only root's PATH looks.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/go/bin"
export PATH

say() { printf 'servers: %s\n' "$*" >&2; }

on_path() {
    for candidate in "$@"; do
        found=$(command -v "$candidate" 2>/dev/null) && [ -x "$found" ] && return 0
    done
    return 1
}

postgres_found() {
    on_path postgres && on_path initdb && return 0
    for candidate in /usr/lib/postgresql/*/bin/postgres; do
        [ -x "$candidate" ] && found=$candidate && return 0
    done
    return 1
}

# Sets `found` to where the server is.
has() {
    found=
    case $1 in
        rabbitmq) on_path rabbitmq-server ;;
        prometheus) on_path promtool && on_path prometheus ;;
        alertmanager) on_path amtool && on_path prometheus-alertmanager alertmanager ;;
        redis) on_path redis-server ;;
        postgresql) postgres_found ;;
        mariadb) on_path mariadb-install-db && on_path mariadbd ;;
        jaeger)
            on_path jaeger-all-in-one all-in-one && return 0
            for candidate in "$cache/bin/jaeger-all-in-one" "${HOME}/go/bin/all-in-one"; do
                [ -x "$candidate" ] && found=$candidate && return 0
            done
            return 1
            ;;
        collector)
            on_path otelcol-meshkit && return 0
            # One built from another manifest lacks a component, or has one that nothing uses any more.
            [ -x "$cache/bin/otelcol-meshkit" ] && cmp -s "$here/otelcol-builder.yaml" "$cache/otelcol-builder.yaml" \
                && found="$cache/bin/otelcol-meshkit"
            ;;
    esac
}

package_of() {
    case $1 in
        rabbitmq) echo rabbitmq-server ;;
        prometheus) echo prometheus ;;
        alertmanager) echo prometheus-alertmanager ;;
        redis) echo redis-server ;;
        postgresql) echo postgresql ;;
        mariadb) echo mariadb-server ;;
    esac
}

packages=
missing_packages() {
    packages=
    for name in rabbitmq prometheus alertmanager redis postgresql mariadb; do
        has "$name" || packages="$packages $(package_of "$name")"
    done
    [ -n "$packages" ]
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# Another apt may hold the lock (an unattended upgrade on a fresh machine): dpkg's own lock is waited for, the others are tried again.
apt_get() {
    for pause in 5 15 30 60 0; do
        as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
            apt-get -q -y -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null >&2 && return 0
        [ "$pause" = 0 ] && return 1
        say "apt-get $1 failed; trying again in $pause s"
        sleep "$pause"
    done
}

policy=/usr/sbin/policy-rc.d
policy_is_ours=
drop_policy() {
    [ -z "$policy_is_ours" ] || as_root rm -f "$policy"
    policy_is_ours=
}

install_packages() {
    line="apt-get install --no-install-recommends$packages"
    if ! command -v apt-get >/dev/null 2>&1; then
        say "there is no apt-get here. Install with your system's packages:$packages"
        return 0
    fi
    if [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then
        say "only root may install packages. Run:  sudo $line"
        return 0
    fi
    say "$line"
    # The tests start instances of their own; a service that the package starts would only hold its standard port.
    if [ ! -e "$policy" ]; then
        policy_is_ours=1
        trap drop_policy EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    apt_get update || say "apt-get update failed; going on with the package lists that are there"
    # Word splitting is meant: one word a package.
    # shellcheck disable=SC2086
    apt_get install --no-install-recommends $packages || say "apt-get install failed; its own lines above say why"
    drop_policy
}

# Builds in a folder beside the cache's and moves the finished program in, so that a broken-off build leaves nothing half made.
build_with_go() {
    if ! command -v go >/dev/null 2>&1; then
        say "$1 is built with Go, and there is no Go here: left out. Install it (https://go.dev/doc/install), then run ./run servers again"
        return 0
    fi
    mkdir -p "$cache/bin"
    work=$(mktemp -d "$cache/build.XXXXXX")
    say "building $1 in $work"
    if (cd "$work" && GOBIN="$work/bin" GOFLAGS="${GOFLAGS:-} -buildvcs=false" && export GOBIN GOFLAGS && "build_$1") >&2; then
        say "built $1"
    else
        say "$1 could not be built; Go's own lines above say why"
    fi
    chmod -R u+w "$work" && rm -rf "$work"
}

build_jaeger() {
    go install "$jaeger_module" && mv bin/all-in-one "$cache/bin/jaeger-all-in-one"
}

build_collector() {
    cp "$here/otelcol-builder.yaml" manifest.yaml \
        && go install "$builder_module" \
        && ./bin/builder --config manifest.yaml \
        && mv otelcol/otelcol-meshkit "$cache/bin/otelcol-meshkit" \
        && mv manifest.yaml "$cache/otelcol-builder.yaml"
}

check=
case ${1-} in
    '') ;;
    --check) check=1 ;;
    *) say "unknown option $1 (there is only --check)"; exit 2 ;;
esac

if [ -z "$check" ]; then
    if missing_packages; then install_packages; fi
    has jaeger || build_with_go jaeger
    has collector || build_with_go collector
fi

missing=
for name in rabbitmq prometheus alertmanager redis postgresql mariadb jaeger collector; do
    if has "$name"; then say "$name: $found"; else missing="$missing $name"; fi
done
if [ -n "$missing" ]; then
    say "missing:$missing"
    exit 3
fi
say "all there"
