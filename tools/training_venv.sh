#!/usr/bin/env bash
# tools/training_venv.sh PYTHON FOLDER: the interpreter of the engine "ort-training", where there can be one.
#
# onnxruntime-training-cpu and onnxruntime own the same folder, so fedge goes in without its
# dependencies. Where the wheel does not exist, fedge trains with the engine "ort" and this says so.
set -euo pipefail
python=$1 folder=$2
wheel=onnxruntime-training-cpu==1.19.2

without() {
  echo "no engine ort-training: $1. Everything runs with the engine ort."
  rm -rf "$folder"
  mkdir "$folder"
  exit 0
}

if [ ! -x "$folder/bin/python" ]; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case $version in
    3.11 | 3.12) ;;
    *) without "$wheel has no wheel for Python $version (make TRAINING_PYTHON=python3.12 … names another)" ;;
  esac
  echo "making $folder with Python $version"
  "$python" -m venv "$folder"
fi
# pip's talk is shown only when it fails: it complains of dependencies that training does not need.
install() {
  said=$("$folder/bin/pip" install --quiet "$@" 2>&1)
}

if ! install --no-deps --only-binary :all: "$wheel"; then
  case $said in
    *"No matching distribution"*) without "$wheel has no wheel for $(uname -sm)" ;;
    *) echo "$said" >&2 && exit 1 ;;
  esac
fi
install numpy onnx flatbuffers 'protobuf<7' && install --no-deps -e . || { echo "$said" >&2 && exit 1; }
