"""The bundle: what a device downloads, verifies and trains from."""
