"""`python -m lora_jax.cli` is `lora-jax`."""

import sys

from lora_jax.cli import main

sys.exit(main())
