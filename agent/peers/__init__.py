"""Entries to and from other devices, and how far each of them is believed."""
