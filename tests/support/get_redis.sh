#!/bin/sh
# Make $1 a redis-server: the one of this machine, else, or if $2 is "debian", Debian's, unpacked
# beside it, where the two may be moved together. Needs no root.
set -eu
target=$1
mkdir -p "$(dirname "$target")"
if [ "${2:-}" != debian ] && found=$(command -v redis-server); then
    ln -sf "$found" "$target"
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "install redis-server 7 or newer: the tests start it, and this is not Debian" >&2
    exit 1
fi
root=$(cd "$(dirname "$target")" && pwd)/redis
mkdir -p "$root/lists/partial" "$root/archives/partial"
apt() {
    apt-get -qq -o "Dir::State=$root" -o "Dir::State::lists=$root/lists" \
        -o Dir::State::status=/var/lib/dpkg/status -o "Dir::Cache=$root" "$@"
}
apt update
apt install --yes --download-only --no-install-recommends redis-server
for package in "$root"/archives/*.deb; do
    dpkg -x "$package" "$root/files"
done
cat >"$target" <<'EOF'
#!/bin/sh
files=$(cd "$(dirname "$0")" && pwd)/redis/files
LD_LIBRARY_PATH=$(echo "$files"/usr/lib/*-linux-gnu) exec "$files/usr/bin/redis-server" "$@"
EOF
chmod +x "$target"
rm -rf "$root/lists" "$root/archives"
