#!/usr/bin/env bash
# tools/aarch64/test.sh PYTHON [PYTEST ARGS…]: emulated Raspberry Pis join a real server.
# Exit code 75: it cannot be tried on this machine, or the packages for it cannot be had now.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=$1
shift

without() {
  echo "no emulated Raspberry Pi: $1" >&2
  exit 75
}
[ "$(id -u)" -eq 0 ] || without "unpacking Debian's packages with their owners needs root"
for program in qemu-aarch64-static mmdebstrap unshare; do
  command -v "$program" >/dev/null ||
    without "$program is missing; on Debian and Ubuntu: apt install qemu-user-static mmdebstrap"
done
unshare --user --map-root-user --mount mount -t binfmt_misc none /proc/sys/fs/binfmt_misc ||
  without "a user namespace cannot have a binfmt_misc of its own (needs Linux 6.7 and permission)"
roots=$("$python" tools/aarch64/roots.py) || without "its packages cannot be had now"

FEDGE_AARCH64=$(paste -sd : <<<"$roots") \
  exec "$python" -m pytest -n 0 -rP tests/integration/test_aarch64.py "$@"
