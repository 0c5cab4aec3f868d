"""The demo: teach SmolLM2-135M to turn a sentence into strict JSON, and prove that it learned."""
