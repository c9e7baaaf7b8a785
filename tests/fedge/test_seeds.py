from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedge.seeds import derive_seed

PARTS = st.lists(st.one_of(st.integers(), st.text()), max_size=4)


def test_recorded_values_never_change() -> None:
    """A saved run is resumed by later versions: these numbers are part of the format."""
    assert derive_seed(0) == 5848749732231079340
    assert derive_seed(0, 1, "client-a", "batches") == 17724427877109453376
    assert derive_seed(42, 3, "sample") == 16732088576395851087


@given(st.integers(), PARTS)
def test_a_seed_fits_64_bits_and_repeats(seed: int, path: list[object]) -> None:
    value = derive_seed(seed, *path)
    assert 0 <= value < 1 << 64
    assert value == derive_seed(seed, *path)


@given(st.integers(), PARTS, PARTS)
def test_different_paths_give_different_seeds(
    seed: int, one: list[object], other: list[object]
) -> None:
    same = list(map(str, one)) == list(map(str, other))
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) is same


def test_parts_cannot_run_into_each_other() -> None:
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
    assert derive_seed(1, 11) != derive_seed(11, 1)
    assert derive_seed(1, "a") != derive_seed(1, "a", "")
