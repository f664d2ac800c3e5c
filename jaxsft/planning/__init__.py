"""The plan of a run: its step compiled for a TPU that is not here, every operation priced."""
