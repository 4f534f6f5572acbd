"""One module per command of `skerry`."""
