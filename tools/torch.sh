#!/usr/bin/env bash
# tools/torch.sh PIP REQUIREMENT: install torch for the tests, or say how to point at a CPU build.
set -euo pipefail
pip=$1 wanted=$2

"$pip" install --quiet "$wanted" && exit 0
cat >&2 <<TEXT

The tests compare with torch, and pip finds no "$wanted".
Point it at a CPU build (the plain index serves gigabytes of CUDA instead), one of:
  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
  PIP_FIND_LINKS=/folder/with/the/wheel make test
or name what you want, whatever its size: make test TORCH=torch==2.13.0
TEXT
exit 2
