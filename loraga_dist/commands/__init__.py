"""The commands beside `init`, each a function and its entry in the table."""
