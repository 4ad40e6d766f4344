"""Attention, its masks and positions."""
