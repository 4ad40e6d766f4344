"""What is asked of a δ recursion: gradients, and what they hide."""
