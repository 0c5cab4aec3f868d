"""Frequencies of rotary positions at the edges of a variant's blend."""

import numpy as np
import pytest

from lora_jax.models.rope import RopeScaling, static_frequencies

pytestmark = pytest.mark.once

# transformers 5.23, `_compute_yarn_parameters`, head_dim 16, theta 10000: contexts and edges with
# which the blend ends behind the last of the 8 planes. Its upper edge is cut at head_dim - 1, as in
# YaRN's own code, and not at the number of planes.
YARN = [
    (
        dict(original_max_position_embeddings=131072, factor=4.0),
        [1.0, 0.31622776, 0.1, 0.031622779, 0.01, 0.0031622779, 0.0008125, 0.00019764237],
    ),
    (
        dict(original_max_position_embeddings=131072, factor=4.0, truncate=False),
        [1.0, 0.31622776, 0.1, 0.031622779, 0.01, 0.0031622779, 0.00090740802, 0.00020816116],
    ),
    (
        dict(
            original_max_position_embeddings=4096, factor=8.0, beta_fast=1e9, beta_slow=1e-12
        ),  # every plane is blended
        [1.0, 0.29778117, 0.08833333, 0.026088793,
         0.0076666665, 0.0022399467, 0.00065, 0.00018710142],
    ),
]  # fmt: skip


@pytest.mark.parametrize("options, expected", YARN)
def test_yarns_blend_may_end_behind_the_last_plane(options, expected):
    got = static_frequencies(16, 10000.0, RopeScaling(rope_type="yarn", **options))
    np.testing.assert_allclose(got, expected, rtol=2e-7)


def test_llama3_blends_the_planes_between_its_edges():
    # transformers 5.23, `_compute_llama3_parameters`: the planes turn 81, 26, 8, 2.6, 0.8 ... times
    scaling = RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=512,
    )
    expected = [1.0, 0.31622776, 0.1, 0.018496677, 0.00125, 0.00039528473, 0.000125, 3.9528473e-05]
    np.testing.assert_allclose(static_frequencies(16, 10000.0, scaling), expected, rtol=2e-7)
