"""What a model is and what a pass of it computed, to read and to look at."""
