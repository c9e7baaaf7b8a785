"""The federation's server: enrolment, device link, durable rounds, registry."""

from fedge.platform import silence_telemetry

silence_telemetry()  # before any module of this package imports Flower
