#!/bin/sh
# tools/aarch64/emulate.sh ROOT COMMAND…: run a command in an Arm root as on the device itself.
#
# No privileges, no container engine: a user namespace with a binfmt_misc of its own (Linux >= 6.7),
# which ends with the command. The network is this machine's. Environment:
#   QEMU_CPU            core to emulate (cortex-a72: a Raspberry Pi 4)
#   FEDGE_EMULATE_SHOW  folders, separated by ":", that the root shall see under their own names
set -eu

if [ "${FEDGE_EMULATE_INSIDE:-}" != 1 ]; then
  FEDGE_EMULATE_INSIDE=1 exec unshare --user --map-root-user --mount "$0" "$@"
fi

root=$1
shift

binfmt=/proc/sys/fs/binfmt_misc
mount -t binfmt_misc none "$binfmt"
# $1 name, $2 ELF class (1: 32 bit, 2: 64 bit), $3 e_machine
register() {
  magic="\\x7fELF\\x0$2\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\x$3\\x00"
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  printf '%s' ":fedge-$1:M::$magic:$mask:$(command -v "qemu-$1-static"):OCF" >"$binfmt/register"
}
register aarch64 2 b7
register arm 1 28

show() {
  mkdir -p "$root$1"
  mount --rbind "$1" "$root$1"
}
show /dev
show /proc
mount --bind "$root/opt/board/cpuinfo" "$root/proc/cpuinfo"
IFS=:
for folder in ${FEDGE_EMULATE_SHOW:-}; do
  show "$folder"
done
unset IFS

exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TMPDIR=/tmp PYTHONUNBUFFERED=1 \
  QEMU_CPU="${QEMU_CPU:-cortex-a72}" ORT_DISABLE_TELEMETRY=1 chroot "$root" "$@"
