#!/usr/bin/env bash
# tools/pythons.sh 3.12 3.13 …: print interpreters of these versions with what a device needs, no more.
#
# Their environments are in .cache/pythons. A version that is not here is left out, and said so.
set -uo pipefail
cd "$(dirname "$0")/.."

for version in "$@"; do
  folder=$PWD/.cache/pythons/$version
  stamp=$folder/.fedge
  if ! cmp -s pyproject.toml "$stamp"; then
    base=$(tools/find_python.sh "$version") || continue
    echo "making $folder" >&2
    rm -rf "$folder"
    "$base" -m venv "$folder" >&2 && "$folder/bin/python" -m pip install -qq -e . >&2 || {
      echo "Python $version is left out: its packages cannot be had now" >&2
      continue
    }
    cp pyproject.toml "$stamp"
  fi
  echo "$folder/bin/python"
done
