"""T5, mT5 and UMT5 against transformers on the same random weights, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.models.encoder_decoder import EncoderDecoderForward
from lora_jax.models.registry import inputs_of
from lora_jax.models.saving import save_merged
from lora_jax.models.t5_config import T5Config

from tests.support.decoder_checks import quick_jit
from tests.support.oracle import oracle
from tests.support.peft_trees import noisy
from tests.support.torch_models import TOLERANCE, load, saver, written

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "models/t5"
SIZES = dict(
    auto="AutoModelForSeq2SeqLM", vocab_size=97, d_model=24, d_kv=4, d_ff=32, num_layers=3,
    num_decoder_layers=2, num_heads=4, decoder_start_token_id=0, initializer_range=0.2,
)  # fmt: skip
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CASES = {
    # Texts are longer than the farthest distance.
    "t5": dict(SIZES, model_type="t5", relative_attention_max_distance=20),
    "t5 v1.1": dict(
        SIZES,
        **GATED,
        model_type="t5",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
    ),
    "t5 of one block": dict(
        SIZES, model_type="t5", num_layers=1, num_decoder_layers=1, feed_forward_proj="gated-silu"
    ),
    "mt5": dict(SIZES, model_type="mt5"),
    "umt5": dict(SIZES, model_type="umt5", relative_attention_max_distance=20),
}
LATER = [pytest.param(c, marks=pytest.mark.slow) if c > "t5" and c != "umt5" else c for c in CASES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(PLACE, CASES, tmp_path_factory)


def texts():
    """Two texts a row, padded on either side, and what is real of them."""
    first, second = (
        np.array(jax.random.randint(jax.random.key(i), (3, n), 2, 97))
        for i, n in ((1, 40), (2, 33))
    )
    second[:, 0] = 0
    mask, seen = np.ones(first.shape, bool), np.ones(second.shape, bool)
    mask[0, :9], mask[1, -11:], seen[0, :4], seen[2, -7:] = False, False, False, False
    return first, second, mask, seen


def theirs(model):
    import torch

    first, second, mask, seen = map(torch.tensor, texts())
    with torch.no_grad():
        return model(
            input_ids=first, decoder_input_ids=second, attention_mask=mask.long(),
            decoder_attention_mask=seen.long(),
        ).logits.numpy()  # fmt: skip


def ours(model):
    first, second, mask, seen = map(jnp.asarray, texts())
    apply = quick_jit(model.apply)
    return np.asarray(apply(model.params, first, second, mask=mask, decoder_mask=seen))


@pytest.mark.parametrize("case", LATER)
def test_logits_are_transformers_there_and_back(saved, case, tmp_path):
    there, directory = saved(case)
    model, (*_, seen) = models.load(directory), texts()
    want = oracle(f"{PLACE}/{case}.logits", lambda: theirs(there()))
    got = ours(model)
    assert np.abs(got - want)[seen].max() <= TOLERANCE
    assert models.config_from_hf(model.config.to_hf()) == model.config
    again = tmp_path / "again"
    save_merged(again, model, model.params)
    tensors, base = (load_file(d / "model.safetensors") for d in (again, directory))
    assert tensors.keys() == base.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, base[name], err_msg=name)

    def read():
        return {"from": written(again), "same": bool((theirs(load(again)) == want)[seen].all())}

    assert oracle(f"{PLACE}/{case}.again", read) == {"from": written(again), "same": True}


@pytest.mark.parametrize("case", ["t5", pytest.param("umt5", marks=pytest.mark.slow)])
def test_blocks_apart_and_steps_over_a_cache_compute_the_same(saved, case):
    _, directory = saved(case)
    model, apart = (models.load(directory, scan=scan) for scan in (True, False))
    first, second, mask, seen = map(jnp.asarray, texts())
    whole = ours(model)
    # The same operations; XLA may fuse them differently.
    np.testing.assert_allclose(ours(apart)[seen], whole[seen], atol=2e-5)
    cache = model.forward.encode(model.params, first, mask=mask, cache_length=second.shape[1])
    step, parts = quick_jit(model.forward.decode), []
    for some in (slice(0, 1), slice(1, 12), slice(12, 33)):
        logits, cache = step(model.params, second[:, some], cache=cache, mask=seen[:, some])
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[seen], whole[seen], atol=2e-5)


def test_a_head_of_its_own_beside_a_field_that_ties(saved, tmp_path):
    """As transformers 5 writes T5 v1.1; before, the table's copies were written too."""
    _, directory = saved("t5 v1.1")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    table = tensors["shared.weight"]
    tensors |= {f"{stack}.embed_tokens.weight": table for stack in ("encoder", "decoder")}
    save_file(
        {**tensors, "lm_head.weight": 2 * table}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model = models.load(tmp_path)
    assert not model.config.tie_word_embeddings
    whole = ours(models.load(directory))
    np.testing.assert_allclose(ours(model), 2 * whole, atol=TOLERANCE)
    want = oracle(f"{PLACE}/head.logits", lambda: theirs(load(tmp_path)))
    assert np.abs(ours(model) - want)[texts()[-1]].max() <= TOLERANCE
    tensors["encoder.embed_tokens.weight"] = 2 * table
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"`.*` differs from `.*`, but the model has one tensor"):
        models.load(tmp_path)


# Fields of public files.
PUBLIC = {
    "flan-t5-base": dict(
        model_type="t5", **GATED, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12,
        vocab_size=32128, n_positions=512, output_past=True, is_gated_act=True,
        dense_act_fn="gelu_new", dropout_rate=0.1, decoder_start_token_id=0, eos_token_id=1,
        is_encoder_decoder=True, initializer_factor=1.0, classifier_dropout=0.0, pad_token_id=0,
        task_specific_params={"summarization": {"max_length": 200}}, use_cache=True,
    ),
    "umt5-small": dict(
        model_type="umt5", d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
        vocab_size=256384, scalable_attention=True, is_encoder_decoder=True,
        tokenizer_class="T5Tokenizer", torch_dtype="float32",
    ),
}  # fmt: skip


def test_fields_of_public_files_are_read(saved):
    flan, umt5 = (models.config_from_hf(raw) for raw in PUBLIC.values())
    assert (flan.activation, flan.gated, flan.scaled) == ("gelu_new", True, False)
    assert (umt5.gated, umt5.kind.every, umt5.num_decoder_layers) == (True, True, 8)
    assert umt5.eos_token_ids == (1,)
    raw = PUBLIC["flan-t5-base"]
    plain = dict(feed_forward_proj="gelu", is_gated_act=False, dense_act_fn="gelu")
    # Only behind `gated-` it is the approximation.
    assert T5Config.from_hf({**raw, **plain}).activation == "gelu"
    for fields, text in (
        (dict(feed_forward_proj="doubled-gelu"), "`feed_forward_proj` must be an activation, or"),
        (dict(feed_forward_proj="gated-tanhh"), "the activation `tanhh` of `feed_forward_proj`"),
        (dict(relative_attention_num_buckets=6), "must be a multiple of 4"),
        (dict(relative_attention_max_distance=16), "less than twice .*, got 32 and 16"),
        (dict(is_encoder_decoder=False), "`is_encoder_decoder` = False is not supported"),
        (dict(tie_encoder_decoder=True), "`tie_encoder_decoder` = True is not supported"),
        (dict(d_model=None), "config.json lacks `d_model`"),
    ):
        with pytest.raises(ValueError, match=text):
            T5Config.from_hf({**raw, **fields, "is_gated_act": None, "dense_act_fn": None})


def test_the_only_block_has_the_distances_itself():
    raw = {**PUBLIC["flan-t5-base"], "num_layers": 1, "num_decoder_layers": 1}
    shapes = EncoderDecoderForward(config=T5Config.from_hf(raw)).shapes()
    for stack in ("encoder", "decoder"):
        attention = shapes[stack]["block"]["0:1"]["layer"]["0"]["SelfAttention"]
        assert attention["relative_attention_bias"]["embedding"].shape == (1, 32, 12)


def test_what_an_encoder_decoder_has_not_is_refused(saved):
    _, directory = saved("t5")
    options: Any = dict(labels=("a", "b"), fresh_head=jax.random.key(0))
    with pytest.raises(ValueError, match="`labels` came for a `t5`, an encoder-decoder, which"):
        models.load(directory, **options)
    with pytest.raises(ValueError, match="`attention` is for decoders, and `t5` is an encoder-dec"):
        models.load(directory, attention="splash")
    model = models.load(directory)
    first, second, mask, _ = texts()
    with pytest.raises(ValueError, match="`tokens` have 3 rows, but `decoder_tokens` 2"):
        model.apply(model.params, first, second[:2])
    with pytest.raises(ValueError, match="`decoder_mask` must be bool"):
        model.apply(model.params, first, second, decoder_mask=mask)


def their_answers(model, prompts):
    import torch

    width = max(map(len, prompts))
    rows = torch.tensor([[*row, *[0] * (width - len(row))] for row in prompts])
    mask = torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in prompts])
    with torch.no_grad():
        found = model.generate(
            rows, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None
        )
    return found[:, 1:].tolist()


@pytest.mark.parametrize("case", ["t5", pytest.param("umt5", marks=pytest.mark.slow)])
def test_greedy_text_is_transformers(saved, case):
    there, directory = saved(case)
    model = models.load(directory)
    prompts = [row[keep].tolist() for row, keep in zip(*texts()[::2], strict=True)]
    want = oracle(f"{PLACE}/{case}.greedy", lambda: their_answers(there(), prompts))
    assert models.generate(model, model.params, prompts, max_new_tokens=20) == want
    # A stop token ends a row, and the start is that of generation_config.json.
    stop = want[0][5]
    (got,) = models.generate(
        model, model.params, prompts[:1], max_new_tokens=20, stop_tokens=(stop,)
    )
    assert got == want[0][: want[0].index(stop)]
    other = models.Model(model.forward, model.params, generation={"decoder_start_token_id": 7})
    again = models.generate(other, model.params, prompts, max_new_tokens=20)
    assert again != want


@pytest.mark.slow
def test_each_prompt_has_an_adapter_of_its_own(saved):
    model = models.load(saved("t5").directory)
    config = lora.LoraConfig(rank=2, target_modules=("q", "wo"))
    plan = lora.plan(config, model.apply, model.params, *inputs_of(model.config))
    some = [noisy(lora.init(jax.random.key(i), plan, model.params), seed=i) for i in (1, 2)]
    prompts = [[5, 9, 30, 1], [44, 8, 1], [3, 3, 3, 12, 1]]
    many = models.generate(
        model, lora.stack(some), prompts, max_new_tokens=9, adapter_ids=[0, 1, -1]
    )
    alone = [
        models.generate(model, params, [prompt], max_new_tokens=9)[0]
        for params, prompt in zip((*some, model.params), prompts, strict=True)
    ]
    assert many == alone
