"""Layers: one file for each family of rules, and the combinators that make layers of layers."""
