"""Name maps: Hugging Face names for a model of the user's own."""
