"""What a Raspberry Pi 4 tells about itself, as files: ``/proc/cpuinfo`` and parts of ``/sys``.

Without them onnxruntime reads this machine's x86 files under emulation and crashes at import.
"""

from __future__ import annotations

from pathlib import Path

MODEL = "Raspberry Pi 4 Model B Rev 1.4"
CORE_MHZ = {"min": 600, "max": 1800}
CACHES = (("Data", 1, "32K"), ("Instruction", 1, "48K"), ("Unified", 2, "1024K"))
_CORE = """\
processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


def write(root: Path, cores: int) -> None:
    """Write the board's files: ``sys/`` and ``opt/board/cpuinfo``, to be mounted over /proc's.

    Args:
        root: Root of the emulated system.
        cores: How many; no more than this machine has, or threads are pinned to none.
    """
    _put(root / "opt/board/cpuinfo", _cpuinfo(cores))
    _put(root / "sys/firmware/devicetree/base/model", f"{MODEL}\0")
    folder = root / "sys/devices/system/cpu"
    every = f"0-{cores - 1}"
    for name in ("possible", "present", "online"):
        _put(folder / name, every)
    _put(folder / "kernel_max", "255")
    for number in range(cores):
        _core(folder / f"cpu{number}", number, every)


def _cpuinfo(cores: int) -> str:
    listed = "".join(_CORE.format(number=n) for n in range(cores))
    return f"{listed}Revision\t: c03114\nModel\t\t: {MODEL}"


def _core(folder: Path, number: int, every: str) -> None:
    for bound, mhz in CORE_MHZ.items():
        _put(folder / f"cpufreq/cpuinfo_{bound}_freq", str(mhz * 1000))
    topology = {"physical_package_id": "0", "core_id": str(number)}
    topology |= {f"{n}_list": every for n in ("core_siblings", "package_cpus", "cluster_cpus")}
    for name, value in {**topology, "thread_siblings_list": str(number)}.items():
        _put(folder / "topology" / name, value)
    for index, (kind, level, size) in enumerate(CACHES):
        sharers = str(number) if level == 1 else every
        entries = {"type": kind, "level": str(level), "size": size, "shared_cpu_list": sharers}
        for name, value in entries.items():
            _put(folder / f"cache/index{index}" / name, value)


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n" if not text.endswith("\0") else text)
