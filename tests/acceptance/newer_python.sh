#!/usr/bin/env bash
# The tests under a newer Python than this machine's: Debian trixie has 3.13.
#
#   JAX='jax==0.11.*' tests/acceptance/newer_python.sh FOLDER [COMMAND...]
#
# FOLDER becomes the root of a small Debian, or is one already. HEAD is checked out into it and set
# up with the release of jax named in JAX; then COMMAND runs there, `make test` unless given, and
# its exit code is the script's. Needs root and debootstrap. pip's settings are this machine's.
set -euo pipefail

packages=python3,python3-venv,make,git,ca-certificates,libgomp1

fail() {
  echo "newer_python.sh: $*" >&2
  exit 2
}

(($#)) || fail "give the folder that is or becomes the root of a Debian"
((EUID == 0)) || fail "needs root"
if [[ -z ${NEWER_PYTHON_MOUNTS-} ]]; then # mounts of our own, which end with this script
  NEWER_PYTHON_MOUNTS=1 exec unshare --mount -- "$0" "$@"
fi

root=$(realpath -m "$1")
shift
if [[ ! -x $root/usr/bin/python3 ]]; then
  command -v debootstrap >/dev/null || fail "needs debootstrap: apt-get install debootstrap"
  debootstrap --variant=minbase --include="$packages" trixie "$root"
fi

# bind FILE_OR_FOLDER: it is seen, at the same path, inside the root too.
bind() {
  if [[ -d $1 ]]; then
    mkdir -p "$root$1"
  else
    mkdir -p "$(dirname "$root$1")"
    [[ -e $root$1 ]] || touch "$root$1"
  fi
  mount --rbind "$1" "$root$1"
}

# Files and folders that pip's settings and the variables of certificates name. An index of local
# files, file:///.../simple, refers to the files in the folder around it.
named() {
  {
    python3 -m pip config debug | sed -n 's/^ *\(.*\), exists: True$/\1/p'
    python3 -m pip config list
    env | grep -E '^(PIP_|[A-Z_]*(SSL|CERT|CA_BUNDLE))' || true
  } | grep -oE "(^|['= ]|file://)/[^' ]+" | sed -E 's#^file://(.*)/.*#\1#; s#^[^/]##' | sort -u
}

for path in /proc /dev /etc/hosts /etc/resolv.conf $(named); do
  [[ ! -e $path ]] || bind "$path"
done

jax=${JAX:-jax}
stack=/stacks/${jax//[^[:alnum:].]/_}
rm -rf "${root:?}$stack/project"
cd "$(dirname "$0")/../.."
git clone --quiet --no-local "$PWD" "$root$stack/project"

(($#)) || set -- make test "VENV=$stack/venv"
# shellcheck disable=SC2016
chroot "$root" /usr/bin/env -u VIRTUAL_ENV -u PYTHONPATH HOME=/root PATH="$stack/venv/bin:/usr/bin:/bin" \
  bash -euc '
    cd "$1/project"
    make --silent setup VENV="$1/venv" EXTRA_REQUIREMENTS="$2"
    python -V
    python -m pip list 2>/dev/null | grep -E "^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy) "
    shift 2
    exec "$@"
  ' - "$stack" "$jax" "$@"
