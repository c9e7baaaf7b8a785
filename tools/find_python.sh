#!/usr/bin/env bash
# tools/find_python.sh 3.13: print an interpreter of that version, or say that there is none (exit 1).
set -uo pipefail
wanted=$1

works() {
  [ -n "$1" ] && "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$wanted')" 2>/dev/null
}
pyenv=${PYENV_ROOT:-$HOME/.pyenv}
for python in "python$wanted" python3 "$(uv python find "$wanted" 2>/dev/null)" \
  "$pyenv/versions/$wanted".*/bin/python; do
  if works "$python"; then
    "$python" -c 'import sys; print(sys.executable)'
    exit 0
  fi
done
echo "no Python $wanted is installed here" >&2
exit 1
