#!/bin/sh
# Makes the environment that the image ships: what it depends on first, with the extra `tracing`, because that
# changes less often.
#
#   PIP=…/pip ops/image/install.sh dependencies TARGET     an environment with them alone, without pip
#   PIP=…/pip ops/image/install.sh program TARGET [ROOT]   adds this checkout's program to it, below ROOT if given
#
# PIP is any pip, which stays outside; the interpreter of TARGET is PYTHON (python3).
set -eu
cd "$(dirname "$0")/../.."
target=$2 root=${3:-}

# Into the environment, in the versions of constraints.txt.
install() {
    "$PIP" --python "$target/bin/python" install --quiet --no-compile --no-input --disable-pip-version-check "$@"
}

# What only those who build such packages need.
strip_packages() {
    find "$1" -type f \( -name '*.pyi' -o -name '*.py[x]' -o -name '*.px[di]' -o -name '*.[ch]' \) -delete
    # Debug symbols are three quarters of uvloop. What psycopg brings has been rewritten, and strip may break it.
    find "$1" -type f -name '*.so' ! -path '*psycopg_binary*' -exec strip --strip-unneeded {} +
}

# Compiled here, because where it runs the file system is read-only: a command starts in 0.3 s instead of 1.0 s.
# Never checked against the sources, so that copying them may change their times.
compile() {
    "$target/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash -s "$root" -p / "$1"
}

case $1 in
dependencies)
    "${PYTHON:-python3}" -m venv --without-pip "$target"
    needed=$(mktemp)
    "$target/bin/python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["tracing"], sep="\n")' >"$needed"
    install --requirement "$needed" --constraint ops/image/constraints.txt
    rm "$needed"
    strip_packages "$target"
    compile "$target"
    ;;
program)
    dist=$(mktemp -d)
    "$PIP" wheel --quiet --no-deps --no-input --disable-pip-version-check --wheel-dir "$dist" .
    install --no-deps --root "${root:-/}" "$dist"/*.whl
    rm -r "$dist"
    compile "$root$target"
    ;;
*)
    echo "$0: expected dependencies or program, got $1" >&2
    exit 2
    ;;
esac
