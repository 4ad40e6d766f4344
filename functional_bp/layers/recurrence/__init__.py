"""Backpropagation through time: cells, sequences, blocks of time, and the recursion over them."""
