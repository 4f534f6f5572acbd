"""Adapters that the device learns: lessons, training, the gate before use, and which adapter a request gets."""
