"""Calibration data: from files to this rank's microbatches, and the loss on them."""
