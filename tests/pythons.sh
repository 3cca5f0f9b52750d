#!/usr/bin/env bash
# A quick part of the tests on every Python from 3.11 on that this machine has, each with an environment of its own: tests/pythons.sh <folder>.
# Looked for are python3.11, python3.12, … on PATH, those of pyenv, and those of uv. The first run installs (minutes, and gigabytes where pip
# takes a GPU build of torch).
set -euo pipefail
cd "$(dirname "$0")/.."
place=${1:?the folder for the environments}
TESTS=(tests/test_cli.py tests/test_completion.py tests/test_layers.py tests/test_library.py tests/test_package.py tests/config tests/cache
  tests/attention/test_own_method.py tests/hf/test_loop.py tests/report tests/run/test_point.py tests/run/test_sweep.py)

find_python() { # the minor version; prints a path, or nothing
  local one
  for one in "$(command -v "python3.$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$1".*/bin/python "$(uv python find "3.$1" 2>/dev/null || true)"; do
    if [ -n "$one" ] && "$one" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, $1))" 2>/dev/null; then
      echo "$one"
      return
    fi
  done
}

tried=()
for minor in 11 12 13 14; do
  python=$(find_python "$minor")
  if [ -z "$python" ]; then
    echo "python 3.$minor: none on this machine, skipped"
    continue
  fi
  own=$place/python3.$minor
  if [ ! -f "$own/.done" ] || [ constraints.txt -nt "$own/.done" ] || [ pyproject.toml -nt "$own/.done" ]; then
    echo "python 3.$minor: installing into $own"
    [ -x "$own/bin/python" ] || "$python" -m venv "$own"
    pip=("$own/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
    "${pip[@]}" setuptools wheel
    "${pip[@]}" --no-build-isolation --editable '.[dev]'
    touch "$own/.done"
  fi
  echo "python 3.$minor: $("$own/bin/python" --version)"
  OMP_NUM_THREADS=1 "$own/bin/python" -m pytest "${TESTS[@]}" -m "not slow and not gpu" -n "${JOBS:-2}"
  tried+=("3.$minor")
done
echo "passed on: ${tried[*]:-no Python that this machine has}"
[ ${#tried[@]} -gt 0 ]
