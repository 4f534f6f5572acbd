"""What the device has learned: entries, the index over them, and when one of them may answer."""
