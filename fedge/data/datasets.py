"""Named data sets, split over clients the way the literature or nature splits them.

Nothing here is shipped with fedge: rows come from the original publisher over HTTPS, from a local
folder, or from scikit-learn's own copies, and every file is checked against a pinned SHA-256.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedge.data.download import Source, fetch
from fedge.data.partition import INPUT
from fedge.errors import ConfigError
from fedge.seeds import derive_seed
from fedge.types import Array, ClientData, Examples

HEART_COLUMNS = (
    *("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak"),
    *("cp_2", "cp_3", "cp_4", "restecg_1", "restecg_2"),
)
_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"
_HEART = {
    site: Source(f"heart_disease/processed.{site}.data", _UCI + f"processed.{site}.data", sha256)
    for site, sha256 in (
        ("cleveland", "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"),
        ("hungarian", "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"),
        ("switzerland", "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"),
        ("va", "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"),
    )
}
_FLAMBY_SEED, _FLAMBY_TEST = 43, 0.34
# hospital -> (malignant, benign) rows: sizes 3.5 to 1, prevalence 20 % to 60 %; all 569 rows
_BREAST = {"east": (48, 192), "north": (72, 88), "south": (60, 40), "west": (32, 37)}


def heart_disease(split: str | int = "flamby") -> list[ClientData]:
    """UCI Heart Disease at its four hospitals, as FLamby's Fed-Heart-Disease cuts it.

    740 of 920 patients: the columns slope, ca and thal are dropped, then rows with a missing
    value. Labels are 1 where the angiogram showed a narrowing (num > 0). The 13 inputs are
    ``HEART_COLUMNS``, unscaled: chest pain (cp) and resting ECG are indicator columns without
    their first level. Rows keep the order of the files.

    Data: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano, UCI Machine Learning Repository,
    1988, CC BY 4.0. Split: J. Ogier du Terrail et al., "FLamby", NeurIPS 2022, arXiv:2210.04620.

    Args:
        split: ``"flamby"`` for the published fixed split, or a number for another split drawn
            the same way (34 % held out, stratified by label except in Switzerland, where too few
            patients are healthy).

    Returns:
        ``cleveland``, ``hungarian``, ``switzerland``, ``va``; inputs ``x`` float32 [N, 13],
        labels int64 [N].

    Raises:
        DataError: If a file cannot be had or is not the pinned one.
        ConfigError: If ``split`` is neither.
    """
    if isinstance(split, str) and split != "flamby":
        raise ConfigError(f"split={split!r}; wanted 'flamby' or a number")
    seed = _FLAMBY_SEED if split == "flamby" else int(split)
    return [_heart_site(site, fetch(source), seed) for site, source in _HEART.items()]


def breast_cancer_hospitals(seed: int = 0, test_fraction: float = 0.3) -> list[ClientData]:
    """Wisconsin breast cancer (scikit-learn's copy) over four made-up hospitals.

    They differ in size (240, 160, 100 and 69 patients) and in the share of malignant tumours
    (20, 45, 60 and 46 %). All 569 rows are used.

    Args:
        seed: Fixes who gets which rows, and which are held out (stratified by label).
        test_fraction: Share of each hospital's rows held out.

    Returns:
        ``east``, ``north``, ``south``, ``west``; inputs ``x`` float32 [N, 30], unscaled, labels
        int64 [N], 1 = malignant.
    """
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    data = Examples({INPUT: x.astype(np.float32)}, (y == 0).astype(np.int64))
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, "breast-cancer")))
    pools = [rng.permutation(np.flatnonzero(data.labels == label)) for label in (1, 0)]
    clients = []
    for hospital, counts in _BREAST.items():
        rows = np.concatenate([pool[:n] for pool, n in zip(pools, counts, strict=True)])
        pools = [pool[n:] for pool, n in zip(pools, counts, strict=True)]
        part = data.take(np.sort(rows))
        split_seed = derive_seed(seed, hospital) % 2**32
        clients.append(_split(hospital, part, test_fraction, split_seed))
    return clients


def digits() -> tuple[Array, Array]:
    """scikit-learn's 1797 handwritten digits, 8 × 8 grey values.

    Returns:
        ``x`` float32 [1797, 64] in [0, 1], ``y`` int64 [1797] in 0…9, for :func:`partition`.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16.0).astype(np.float32), y.astype(np.int64)


def _heart_site(site: str, path: Path, seed: int) -> ClientData:
    lines = [line.split(",") for line in path.read_text("ascii").split()]
    kept = [[*row[:10], row[13]] for row in lines if "?" not in row[:10] + row[13:]]
    raw = np.array(kept, np.float64)
    age, sex, cp, trestbps, chol, fbs, restecg, thalach, exang, oldpeak, num = raw.T
    columns = [age, sex, trestbps, chol, fbs, thalach, exang, oldpeak]
    columns += [cp == level for level in (2, 3, 4)] + [restecg == level for level in (1, 2)]
    data = Examples({INPUT: np.stack(columns, 1).astype(np.float32)}, (num > 0).astype(np.int64))
    return _split(site, data, _FLAMBY_TEST, seed, stratify=site != "switzerland")


def _split(
    client_id: str, data: Examples, test_fraction: float, seed: int, stratify: bool = True
) -> ClientData:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(data)),
        train_size=1 - test_fraction,
        test_size=test_fraction,
        random_state=seed,
        shuffle=True,
        stratify=data.labels if stratify else None,
    )
    return ClientData(client_id, data.take(np.sort(train)), data.take(np.sort(test)))
