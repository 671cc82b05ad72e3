#!/usr/bin/env bash
# Install what `make test-system` needs and this machine lacks: a container engine, the means to make
# a base image, and the toolchain of the C++ client. Only as root on Debian and its like; elsewhere
# the tests say what is missing.
set -euo pipefail

packages=()
need() { # COMMAND PACKAGE...
    command -v "$1" > /dev/null || packages+=("${@:2}")
}

if ! timeout 20 docker info > /dev/null 2>&1; then
    need podman podman runc conmon netavark aardvark-dns catatonit iptables
fi
need debootstrap debootstrap
need g++ g++
need pkg-config pkg-config
need protoc protobuf-compiler
need grpc_cpp_plugin protobuf-compiler-grpc
need node nodejs npm
pkg-config --exists grpc++ 2> /dev/null || packages+=(libgrpc++-dev libprotobuf-dev)

if [ ${#packages[@]} -eq 0 ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "install these yourself (Debian's names): ${packages[*]}" >&2
    exit 1
fi
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"
