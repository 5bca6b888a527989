# shellcheck shell=bash
# What launch/tpu_pod.sh and launch/ssh.sh share: machines that are reached by ssh. Sourced, never
# run. They define, beside the flags below:
#   folder                  where the runs are, on the machines
#   on_workers WORKER TEXT  run a script there; WORKER is a number or `all`
#   worker WORKER WORD...   call launch/worker.sh there
# shellcheck disable=SC2154 # repo, ref, python: flags

# Text of a script that puts the path of a Python which is new enough into the file $python_file, in the
# home folder, or says what is missing.
python_file=.ppflow_jax_python
find_python() {
  local names="python3 python3.14 python3.13 python3.12 python3.11"
  if [[ -n $python && $python != install ]]; then names=$(quote "$python"); fi
  cat <<END
python=
for name in $names; do
  "\$name" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || continue
  python=\$(command -v "\$name")
  break
done
END
  if [[ $python == install ]]; then
    cat <<'END'
if [ -z "$python" ]; then
  PATH=$HOME/.local/bin:$PATH
  command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh || python3 -m pip install --user uv
  uv python install 3.12 && python=$(uv python find --managed-python 3.12)
fi >&2
END
  fi
  cat <<END
if [ -z "\$python" ]; then
  echo "\$(hostname): no Python 3.11 or newer that has venv: tried $names;" \\
    "give --python=FILE, or --python=install to install one with uv" >&2
  exit 1
fi
echo "\$(hostname): \$python"
echo "\$python" > $python_file
END
}

# Python first, on all machines, before anything is copied to one.
setup() { # EXTRA
  need repo
  local clone
  on_workers all "$(find_python)"
  clone="git clone --quiet $(quote "$repo" "$folder")"
  if [[ -n $ref ]]; then clone+=" --branch $(quote "$ref")"; fi
  on_workers all "set -e
[ -d $(quote "$folder") ] || $clone
\"\$(cat $python_file)\" -m venv $(quote "$folder/.venv")
cd $(quote "$folder")
.venv/bin/pip install --quiet -e \".[$1]\""
}

# verdict CODES: what the exit codes of all machines, a line each, ask for.
verdict() {
  if grep -qvxE '[0-9]+|none' <<<"$1"; then
    echo wait # running, or unreachable
  elif grep -qx '[12]' <<<"$1"; then
    echo failed
  elif ! grep -qvx 0 <<<"$1"; then
    echo ended
  elif grep -qx none <<<"$1"; then
    echo start
  else
    echo again
  fi
}

# again CODES: count an end that was not asked for, and stop at --restarts of them.
ends=0
again() {
  if grep -qvx 75 <<<"$1"; then ends=$((ends + 1)); fi
  ((ends <= restarts)) || fail "ended with $(tr '\n' ' ' <<<"$1")after $restarts restarts: $me tail"
  echo "$me: ended with $(tr '\n' ' ' <<<"$1"), again"
}
