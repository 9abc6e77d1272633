"""The fourth hand-over: an output, as its layout and its report, written, read and verified."""
