#!/usr/bin/env bash
# tools/provider_python.sh PYTHON WHEEL: print an interpreter that has this onnxruntime, such as
# onnxruntime-openvino or onnxruntime-gpu, and what a worker needs, in .cache/providers/WHEEL.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 wheel=$2
folder=$PWD/.cache/providers/$wheel

if [ ! -e "$folder/.fedge" ]; then
  echo "making $folder (half a gigabyte)" >&2
  rm -rf "$folder"
  "$python" -m venv "$folder" >&2
  "$folder/bin/pip" install -qq "$wheel" 'numpy<3' 'cryptography>=44' 'protobuf>=6.31.1,<7' psutil >&2
  touch "$folder/.fedge"
fi
echo "$folder/bin/python"
