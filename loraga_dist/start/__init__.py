"""The third hand-over: a model becomes its own start; A0, B0 made, put in place and compared."""
