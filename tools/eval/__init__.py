"""Evaluations on real text and real models."""
