"""llama.cpp's GGUF files: models and adapters."""
