"""Data for experiments: ways to split rows over clients, named data sets, scaling."""

from __future__ import annotations

from fedge.data.datasets import breast_cancer_hospitals, digits, heart_disease
from fedge.data.partition import by_site, partition
from fedge.data.scaling import Moments, Standard, combine, moments, site_stats

__all__ = [
    "Moments",
    "Standard",
    "breast_cancer_hospitals",
    "by_site",
    "combine",
    "digits",
    "heart_disease",
    "moments",
    "partition",
    "site_stats",
]
