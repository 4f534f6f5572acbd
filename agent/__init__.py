"""The device: writes token by token, and asks for help where it is unsure."""
