"""The tests here need packages that no other test has: `make integrations`."""

import os

# Set by that target, in the environments that it makes.
if not os.environ.get("LORA_JAX_INTEGRATIONS"):
    collect_ignore_glob = ["test_*.py"]
