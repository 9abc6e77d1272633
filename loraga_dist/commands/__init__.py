"""The table of all commands, what they do on files alone, and the library call that saves a start."""
