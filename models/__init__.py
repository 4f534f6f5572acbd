"""Get, check, convert and run model files."""
