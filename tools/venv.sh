#!/usr/bin/env bash
# tools/venv.sh PYTHON FOLDER: make a virtual environment unless it is there.
set -euo pipefail
python=$1 folder=$2

[ -x "$folder/bin/python" ] && "$folder/bin/python" -c 'import pip' 2>/dev/null && exit 0

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "fedge needs Python 3.11 or newer; $python is $("$python" --version 2>&1 || echo missing)." >&2
  echo "Name another: make PYTHON=python3.12 …" >&2
  exit 2
fi
echo "making $folder with $("$python" --version)"
if ! "$python" -m venv "$folder"; then
  echo "$python cannot make environments; on Debian, Ubuntu and Raspberry Pi OS: apt install python3-venv" >&2
  exit 2
fi
