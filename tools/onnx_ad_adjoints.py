"""Differentiate a folder of models with onnx-ad; runs in an environment that has it.

``python onnx_ad_adjoints.py FOLDER``: beside each ``NAME.onnx`` comes ``NAME.adj``, its adjoint
model, else ``NAME.first``, the one of the first output alone, else ``NAME.txt``, why there is none.
``NAME.json`` says by what and of what.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main(folder: Path) -> None:
    """Go through the folder; prints onnx-ad's version."""
    import onnx
    from onnx_ad import reverse

    print(version("onnx-ad"))
    for path in sorted(folder.glob("*.onnx")):
        asked = json.loads(path.with_suffix(".json").read_text())
        for of, suffix in ((asked["of"], ".adj"), (asked["of"][:1], ".first")):
            try:
                model = reverse(onnx.load(path), asked["by"], of, layout="onnx")
            except Exception as exc:  # noqa: BLE001 - whatever it raises is its answer
                path.with_suffix(".txt").write_text(f"{type(exc).__name__}: {exc}")
            else:
                path.with_suffix(suffix).write_bytes(model.SerializeToString())
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
