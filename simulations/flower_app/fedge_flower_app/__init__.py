"""fedge as a standard Flower app."""
