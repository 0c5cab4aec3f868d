"""The encoders against transformers on the same random weights, in float32."""

import copy
import dataclasses
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.models.bert_config import BertConfig
from lora_jax.models.bert_parts import Build
from lora_jax.models.deberta import Convolution, distance_rows
from lora_jax.models.deberta_config import Deberta
from lora_jax.models.saving import save_model

from tests.support.decoder_checks import check_config_kept, without_source
from tests.support.oracle import oracle
from tests.support.torch_models import DEBERTA, DISTIL, MODERN, TOLERANCE, load, saver
from tests.support.torch_models import ENCODER_SIZES as SIZES

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "models/bert"
CLASSES = {
    "features": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
CASES = {
    "bert": ("bert", "features", {}),
    "bert classifies": ("bert", "sequence-classification", dict(num_labels=3)),
    "bert by the tanh gelu": ("bert", "features", dict(hidden_act="gelu_new")),
    "bert by relu": ("bert", "masked-lm", dict(hidden_act="relu", layer_norm_eps=1e-3)),
    "roberta": ("roberta", "features", {}),
    "roberta classifies": ("roberta", "sequence-classification", dict(num_labels=1)),
    "roberta guesses words": ("roberta", "masked-lm", dict(hidden_act="gelu_new")),
    "xlm-roberta": ("xlm-roberta", "sequence-classification", dict(pad_token_id=3)),
    "camembert": ("camembert", "masked-lm", {}),
    "bert marks tokens": ("bert", "token-classification", dict(num_labels=5)),
    "bert finds answers": ("bert", "question-answering", {}),
    "roberta marks tokens": ("roberta", "token-classification", dict(num_labels=5)),
    "roberta finds answers": ("roberta", "question-answering", {}),
    "electra marks tokens": ("electra", "token-classification", dict(embedding_size=16)),
    "distilbert marks tokens": ("distilbert", "token-classification", dict(num_labels=5)),
    "distilbert finds answers": ("distilbert", "question-answering", {}),
    "electra": ("electra", "features", dict(embedding_size=16)),
    "electra classifies": ("electra", "sequence-classification", dict(embedding_size=32)),
    "distilbert": ("distilbert", "features", {}),
    "distilbert classifies": ("distilbert", "sequence-classification", dict(num_labels=3)),
    "distilbert guesses words": ("distilbert", "masked-lm", dict(activation="relu")),
    "modernbert": ("modernbert", "features", {}),
    "modernbert classifies": (
        "modernbert", "sequence-classification", dict(num_labels=3, classifier_pooling="mean"),
    ),
    "modernbert classifies by the first": (
        "modernbert", "sequence-classification",
        dict(classifier_bias=True, classifier_activation="relu", num_hidden_layers=6),
    ),
    "modernbert guesses words": ("modernbert", "masked-lm", {}),
    "modernbert with other biases": (
        "modernbert", "masked-lm",
        dict(
            decoder_bias=False, norm_bias=True, attention_bias=True, mlp_bias=True,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ),
    "modernbert marks tokens": ("modernbert", "token-classification", dict(num_labels=5)),
    "modernbert finds answers": ("modernbert", "question-answering", {}),
    "deberta": ("deberta-v2", "features", {}),
    "deberta classifies": ("deberta-v2", "sequence-classification", dict(num_labels=3)),
    "deberta guesses words": ("deberta-v2", "masked-lm", {}),
    "deberta guesses words by the new head": ("deberta-v2", "masked-lm", dict(legacy=False)),
    "deberta with projections of distances": (
        "deberta-v2", "token-classification",
        dict(
            num_labels=5, share_att_key=False, position_buckets=-1, max_relative_positions=5,
            norm_rel_ebd="none",
        ),
    ),
    "deberta by the distance of queries": (
        "deberta-v2", "features",
        dict(
            share_att_key=False, pos_att_type=["c2p"], position_biased_input=True,
            type_vocab_size=2,
        ),
    ),
    "deberta without distances": ("deberta-v2", "features", dict(relative_attention=False)),
    "deberta by neither distance": (
        "deberta-v2", "features", dict(share_att_key=False, pos_att_type=[]),
    ),
    "deberta finds answers": ("deberta-v2", "question-answering", {}),
    "deberta with a convolution": (
        "deberta-v2", "sequence-classification", dict(conv_kernel_size=3, conv_act="gelu"),
    ),
    "deberta with a convolution in groups": (
        "deberta-v2", "features", dict(conv_kernel_size=5, conv_groups=2),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes and saves the model of a case, once."""
    fields = {
        case: {
            **{"distilbert": DISTIL, "modernbert": MODERN, "deberta-v2": DEBERTA}.get(kind, SIZES),
            "model_type": kind,
            "auto": CLASSES[task],
            **more,
        }
        for case, (kind, task, more) in CASES.items()
    }
    return saver(PLACE, fields, tmp_path_factory)


def texts(padding_id=1):
    """Tokens, mask and types of four texts, two padded on the left and two on the right."""
    tokens = np.array(jax.random.randint(jax.random.key(1), (4, 12), 4, 97))
    mask = np.arange(12) < np.array([[12], [7], [5], [1]])
    mask[2:] = mask[2:, ::-1]
    types = np.arange(12)[None] // 4 % 2 * mask
    return np.where(mask, tokens, padding_id), mask, types


def typed(config, types) -> dict:
    """The types of tokens, for a model that has any."""
    untyped = config.model_type in ("distilbert", "modernbert") or not config.type_vocab_size
    return {} if untyped else {"token_type_ids": types}


def theirs(model, tokens, mask, types):
    """The arrays that a torch encoder returns, by name."""
    import torch

    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),  # a convolution takes no bools
            **typed(model.config, torch.tensor(types)),
        )
    return {name: x.float().numpy() for name, x in out.items()}


def quick(fn):
    """Each case compiles anew and runs once: little optimization halves the time."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, atol=TOLERANCE, rtol=0)


def compare(model, got, want, mask):
    if model.config.task == "features":
        close(got.hidden[mask], want["last_hidden_state"][mask])
        if "pooler_output" in want:
            close(got.pooled, want["pooler_output"])
        else:
            assert got.pooled is None
    elif model.config.task == "question-answering":
        ends = np.stack([want["start_logits"], want["end_logits"]], axis=-1)
        close(got[mask], ends[mask])
    elif model.config.task != "sequence-classification":
        close(got[mask], want["logits"][mask])
    elif model.config.own is not None and getattr(model.config.own, "pooling", "cls") == "cls":
        # With a window, and in DeBERTa, what padding in the first place attends to is nothing.
        close(got[mask[:, 0]], want["logits"][mask[:, 0]])
    else:
        close(got, want["logits"])


def answer(saved, case, mask, tokens, types):
    """What transformers computes with a case's model."""
    return oracle(
        f"{PLACE}/{case}.outputs", lambda: theirs(saved(case).model(), tokens, mask, types)
    )


# Their blocks are those of other cases.
LATER = [case for case in CASES if case.endswith((" tokens", " answers"))]
LATER[1:1] = [
    case for case in CASES if case.startswith(("modernbert ", "deberta ")) and case not in LATER
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in LATER[1:-1] else c for c in CASES]
)
def test_numbers_are_transformers_there_and_back(saved, case, tmp_path):
    there, directory = saved(case)
    model = models.load(directory)
    tokens, mask, types = texts(model.config.pad_token_id)
    own = typed(model.config, jnp.asarray(types))
    got = quick(model.apply)(model.params, tokens, mask=jnp.asarray(mask), **own)
    compare(model, got, answer(saved, case, mask, tokens, types), mask)

    check_config_kept(model, tmp_path / "kept")
    save_model(tmp_path / "again", without_source(model), model.params)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    original = load_file(directory / "model.safetensors")

    def read():
        again = load(tmp_path / "again")
        for name, weight in there().state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[name].numpy(), weight.numpy())
        return {"config": written, "names": sorted(tensors), **theirs(again, tokens, mask, types)}

    want = oracle(f"{PLACE}/{case}.again", read)
    # What was recorded is transformers' reading of this very directory.
    assert (want["config"], want["names"]) == (written, sorted(tensors))
    for name in tensors.keys() & original.keys():
        np.testing.assert_array_equal(tensors[name], original[name])
    compare(model, got, want, mask)
    loaded = models.load(tmp_path / "again")
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize("case", ["bert classifies", "roberta"])
def test_blocks_apart_compute_the_same(saved, case, tmp_path):
    _, directory = saved(case)
    model = models.load(directory, scan=False)
    outer = model.params if case == "roberta" else model.params["bert"]
    assert set(outer["encoder"]["layer"]) == {"0", "1", "2"}
    tokens, mask, types = texts()
    got = model.apply(
        model.params, tokens, mask=jnp.asarray(mask), token_type_ids=jnp.asarray(types)
    )
    compare(model, got, answer(saved, case, mask, tokens, types), mask)
    save_model(tmp_path / "again", model, model.params)
    whole = models.load(directory)
    jax.tree.map(
        np.testing.assert_array_equal, models.load(tmp_path / "again").params, whole.params
    )


@pytest.mark.slow
def test_modernbert_reads_what_its_files_had_before(saved):
    """Periods and bases in place of lists, and BERT's field for an epsilon, which it never read."""
    model = models.load(saved("modernbert").directory)
    fields = model.config.to_hf()
    before = {n: x for n, x in fields.items() if n not in ("layer_types", "rope_parameters")}
    more = dict(
        global_attn_every_n_layers=3, global_rope_theta=160000.0, local_rope_theta=10000.0,
        layer_norm_eps=0.1, reference_compile=True,
    )  # fmt: skip
    assert BertConfig.from_hf({**before, **more}) == model.config
    ropes = {"full_attention": {"rope_type": "yarn", "factor": 2.0}}
    with pytest.raises(ValueError, match="`rope_parameters` of type `yarn` are not supported"):
        BertConfig.from_hf({**fields, "rope_parameters": ropes})


@pytest.mark.slow
def test_deberta_reads_microsofts_files(saved, tmp_path):
    """Words for lists, no class, a table of positions that is not used, and two other heads."""
    case = "deberta guesses words by the new head"
    model = models.load(saved(case).directory)
    raw = {**model.config.to_hf(), "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm"}
    del raw["architectures"], raw["legacy"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = load_file(saved(case).directory / "model.safetensors")
    unused = np.ones((40, 32), np.float32)
    tensors |= {"deberta.embeddings.position_embeddings.weight": unused}
    tensors |= {"mask_predictions.dense.weight": unused}
    save_file(tensors, tmp_path / "model.safetensors")
    options: Any = dict(
        task="sequence-classification", labels=("a", "b"), fresh_head=jax.random.key(0)
    )
    read = models.load_encoder(tmp_path, **options)
    for name in ("embeddings", "encoder"):
        jax.tree.map(
            np.testing.assert_array_equal, read.params["deberta"][name],
            model.params["deberta"][name],
        )  # fmt: skip
    assert set(read.params) == {"deberta", "pooler", "classifier"}


def test_padding_does_not_count_in_a_mean():
    raw = {
        **MODERN,
        "model_type": "modernbert",
        "num_hidden_layers": 1,
        "classifier_pooling": "mean",
    }
    config = models.BertConfig.from_hf(raw, task="sequence-classification")
    model = models.init(jax.random.key(0), config)
    tokens = np.array([[5, 6, 7, 8]])
    padded, mask = np.pad(tokens, ((0, 0), (0, 4))), np.arange(8)[None] < 4
    got = model.apply(model.params, padded, mask=mask)
    np.testing.assert_allclose(got, model.apply(model.params, tokens), atol=1e-5)


def test_distances_beyond_half_of_the_buckets_share_rows():
    """By the logarithm, `ceil(2 log(d / 3) / log(7 / 3)) + 3`; the farthest have the last row."""
    rows = distance_rows(9, Deberta(distances=8, buckets=6))
    assert rows.tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11, 11]
    rows = distance_rows(5, Deberta(distances=3))
    assert rows.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]


def test_distances_share_rows_as_in_transformers():
    """Of the published sizes, 256 buckets for 512 distances."""

    def theirs():
        import torch
        from transformers.models.deberta_v2 import modeling_deberta_v2 as there

        distance = torch.arange(-599, 600)
        return there.make_log_bucket_position(distance, 256, 512).numpy()

    want = oracle(f"{PLACE}/rows of distances", theirs)
    found = distance_rows(600, Deberta(distances=512, buckets=256))
    np.testing.assert_array_equal(found, np.clip(want + 256, 0, 511))


def test_debertas_convolution_is_of_real_tokens_and_in_the_first_block_alone():
    raw = {**DEBERTA, "model_type": "deberta-v2", "conv_kernel_size": 3}
    config = BertConfig.from_hf(raw, task="features")
    conv = Convolution(Build(config, jnp.float32, jnp.float32, nnx.Rngs(0)))
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 6, config.hidden_size))
    run = conv.after(x, jnp.arange(6)[None] < 4)
    np.testing.assert_array_equal(run(y, jnp.int32(1)), y)
    alone = conv.after(x[:, :4], None)(y[:, :4], jnp.int32(0))
    np.testing.assert_allclose(run(y, jnp.int32(0))[:, :4], alone, atol=1e-6)
    assert np.abs(alone - y[:, :4]).max() > 0.1


@pytest.mark.slow
def test_deberta_reads_rows_longer_than_its_distances(saved):
    case = "deberta with projections of distances"
    model = models.load(saved(case).directory)
    tokens = np.array(jax.random.randint(jax.random.key(2), (2, 60), 4, 97))
    mask = np.arange(60) < np.array([[60], [51]])
    want = oracle(
        f"{PLACE}/{case}.long", lambda: theirs(saved(case).model(), tokens, mask, 0 * tokens)
    )
    got = quick(model.apply)(model.params, tokens, mask=jnp.asarray(mask))
    compare(model, got, want, mask)


def test_what_deberta_has_not_is_refused(saved):
    raw = models.load(saved("deberta").directory).config.to_hf()
    for fields, text in (
        (dict(conv_kernel_size=4), "`conv_kernel_size` must be odd, got 4"),
        (dict(conv_kernel_size=3, conv_groups=7), "`conv_groups` must be a divisor of `hidden_s"),
        (dict(conv_kernel_size=3, conv_act="elu"), "`conv_act` must be of silu, .*, got 'elu'"),
        (dict(norm_rel_ebd="batch_norm"), "`norm_rel_ebd` must be of none, layer_norm"),
        (dict(pos_att_type=["p2p"]), "`pos_att_type` must be of c2p, p2c"),
        (dict(position_buckets=2.5), "`position_buckets` must be a whole number"),
    ):
        with pytest.raises(ValueError, match=text):
            BertConfig.from_hf({**raw, **fields})
    model = models.load(saved("deberta").directory)
    with pytest.raises(ValueError, match="`positions` came for `deberta-v2`, which has no table"):
        model.apply(model.params, np.ones((1, 3), int), positions=np.ones((1, 3), int))
    with pytest.raises(ValueError, match='axis "context", but attention by distance'):
        dataclasses.replace(model.forward, tokens="context")


def test_roberta_counts_tokens_by_the_padding_id_not_by_the_mask(saved):
    there, directory = saved("roberta classifies")
    model = models.load(directory)
    tokens, mask, _ = texts()
    # A token that is masked, but is no padding, takes a position all the same.
    tokens[2, 6], mask[2, 6] = 9, False
    want = oracle(
        f"{PLACE}/roberta counts",
        lambda: theirs(there(), tokens, mask, np.zeros_like(tokens))["logits"],
    )
    close(model.apply(model.params, tokens, mask=jnp.asarray(mask)), want)


def test_the_head_is_applied_to_hidden_states(saved):
    _, directory = saved("bert classifies")
    model = models.load(directory)
    tokens, mask, _ = texts()
    hidden = model.apply(model.params, tokens, mask=jnp.asarray(mask), return_hidden=True)
    assert hidden.shape == (4, 12, 32)
    want = model.apply(model.params, tokens, mask=jnp.asarray(mask))
    # `apply` is compiled as one program, whose sums may be fused.
    np.testing.assert_allclose(model.head(model.params, hidden), want, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_transformers_in_bfloat16(saved):
    there, directory = saved("bert classifies")
    model = models.load(directory, dtype="bfloat16")
    tokens, mask, types = texts()

    def both():
        import torch

        coarse = copy.deepcopy(there()).to(torch.bfloat16)
        each = [theirs(x, tokens, mask, types)["logits"] for x in (there(), coarse)]
        return {"exact": each[0], "rounding": float(np.abs(each[1] - each[0]).max())}

    want = oracle(f"{PLACE}/bert classifies.bfloat16", both)
    got = model.apply(
        model.params, tokens, mask=jnp.asarray(mask), token_type_ids=jnp.asarray(types)
    )
    assert got.dtype == np.float32 and model.params["classifier"]["kernel"].dtype == jnp.bfloat16
    assert np.abs(got - want["exact"]).max() <= 2 * want["rounding"]


# ---- other classes' checkpoints


def test_a_bare_encoders_checkpoint_gets_a_head_that_is_asked_for(saved):
    _, directory = saved("bert")
    with pytest.raises(ValueError, match=r"2 missing: `classifier.bias`, `classifier.weight`.*pass "
                       r"`fresh_head`"):  # fmt: skip
        models.load_encoder(directory, task="sequence-classification")
    model = models.load_encoder(
        directory,
        task="sequence-classification",
        labels=("no", "maybe", "yes"),
        fresh_head=jax.random.key(0),
    )
    assert model.config.labels == ("no", "maybe", "yes")
    tensors = load_file(directory / "model.safetensors")
    weight = tensors["encoder.layer.1.attention.self.query.weight"]
    kernel = model.params["bert"]["encoder"]["layer"]["attention"]["self"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel[1], weight.T)
    head = model.params["classifier"]
    assert head["kernel"].shape == (32, 3) and 0.2 < float(jnp.std(head["kernel"])) < 0.4
    np.testing.assert_array_equal(head["bias"], np.zeros(3))
    tokens, mask, types = texts()
    pooled = answer(saved, "bert", mask, tokens, types)["pooler_output"]
    got = model.apply(
        model.params, tokens, mask=jnp.asarray(mask), token_type_ids=jnp.asarray(types)
    )
    np.testing.assert_allclose(got, pooled @ head["kernel"], atol=TOLERANCE)


def test_a_masked_lm_becomes_an_encoder_or_a_classifier(saved):
    there, directory = saved("roberta guesses words")
    bare = models.load_encoder(directory, task="features")
    assert not bare.config.pooler and "pooler" not in bare.params
    tokens, mask, types = texts()
    out = bare.apply(bare.params, tokens, mask=jnp.asarray(mask), token_type_ids=jnp.asarray(types))
    want = oracle(
        f"{PLACE}/roberta guesses words.hidden",
        lambda: theirs(there().roberta, tokens, mask, types)["last_hidden_state"],
    )
    close(out.hidden[mask], want[mask])
    assert out.pooled is None
    options: dict[str, Any] = dict(task="sequence-classification", fresh_head=jax.random.key(0))
    model = models.load_encoder(directory, **options)
    assert set(model.params["classifier"]) == {"dense", "out_proj"}
    assert "lm_head" not in model.params
    # BERT's classifier sits on a pooler, which a masked LM lacks: drawn with the head.
    _, directory = saved("bert by relu")
    assert "pooler" in models.load_encoder(directory, **options).params["bert"]


def test_the_key_draws_the_head(saved):
    _, directory = saved("bert")
    make = lambda seed: models.load_encoder(  # noqa: E731
        directory, task="sequence-classification", fresh_head=jax.random.key(seed)
    ).params["classifier"]["kernel"]
    np.testing.assert_array_equal(make(0), make(0))
    assert not np.array_equal(make(0), make(1))


def test_an_old_checkpoint_loads(saved, tmp_path):
    """Norms called gamma and beta, stored position ids, a repeated table."""
    _, directory = saved("bert by relu")
    tensors = load_file(directory / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    table = old["bert.embeddings.word_embeddings.weight"]
    old |= {
        "bert.embeddings.position_ids": np.arange(40)[None],
        "cls.predictions.decoder.weight": table,
    }
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    jax.tree.map(
        np.testing.assert_array_equal,
        models.load(tmp_path).params,
        models.load(directory).params,
    )
    save_file({**old, "cls.predictions.decoder.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`cls.predictions.decoder.weight` differs from `bert.emb"):
        models.load(tmp_path)


def edited(directory, tmp_path, **fields):
    raw = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **fields}))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return tmp_path


BAD_CONFIGS = {
    "another class": (
        dict(architectures=["BertForPreTraining"]),
        "`architectures` names `BertForPreTraining`, which is not one of BertModel",
    ),
    "a decoder": (dict(is_decoder=True), "`is_decoder` = True is not supported"),
    "relative positions": (
        dict(position_embedding_type="relative_key"),
        "`position_embedding_type` = 'relative_key' is not supported",
    ),
    "an unknown field": (dict(sparkle=3), "field `sparkle` = 3 is not known for model_type `bert`"),
    "an activation": (dict(hidden_act="xielu"), "hidden_act `xielu` is not one of silu"),
    "heads": (dict(num_attention_heads=5), r"`hidden_size` \(32\) is not a multiple"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_what_is_not_known_is_refused(saved, tmp_path, case):
    fields, text = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=text):
        models.load(edited(saved("bert classifies")[1], tmp_path, **fields))


BAD_OPTIONS = {
    "task": (dict(task="translation"), "`task` must be one of features, sequence-class.*'transl"),
    "head": (dict(fresh_head=jax.random.key(0)), '`fresh_head` needs task="sequence-classifi'),
    "labels": (dict(labels=("a",)), "`labels` are the checkpoint's own unless"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_contradict_each_other(saved, case):
    options, text = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=text):
        models.load_encoder(saved("bert classifies")[1], **options)


def test_a_checkpoint_of_another_class_is_an_error(saved, tmp_path):
    _, directory = saved("bert classifies")
    moved = edited(directory, tmp_path, architectures=["BertModel"])
    text = "2 not part of the model: `classifier.bias`.*pass `task` to leave out the heads"
    with pytest.raises(ValueError, match=text):
        models.load(moved)


@pytest.mark.wrong_types
def test_inputs_are_checked(saved):
    model = models.load(saved("roberta classifies")[1])
    tokens, mask, _ = texts()
    for inputs, options, text in [
        (tokens[0], {}, "`tokens` must be integers of shape"),
        (np.ones((1, 39), int), {}, "longer than the model's context of 38"),
        (tokens, dict(mask=mask.astype(int)), "`mask` must be bool"),
        (
            tokens,
            dict(token_type_ids=mask),
            "`token_type_ids` must be integers of the tokens' shape",
        ),
        (tokens, dict(positions=tokens[:1]), "`positions` must be integers of the tokens' shape"),
    ]:
        with pytest.raises(ValueError, match=text):
            model.apply(model.params, inputs, **options)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("task", CLASSES)
def test_the_written_config_is_read_by_transformers(kind, task):
    config = BertConfig.from_hf(
        dict(model_type=kind, id2label={"0": "a", "1": "b", "2": "c"}, **SIZES), task=task
    )
    assert BertConfig.from_hf(config.to_hf()) == config
    written = config.to_hf()

    def read():
        import transformers

        again = transformers.AutoConfig.for_model(**copy.deepcopy(written))
        model = getattr(transformers, CLASSES[task]).from_config(again)
        return {
            "from": written,
            "labels": again.num_labels,
            "padding": again.pad_token_id,
            "class": type(model).__name__,
        }

    there = oracle(f"{PLACE}/{kind} {task}.config", read)
    assert there["from"] == json.loads(json.dumps(written))
    assert (there["labels"], there["padding"]) == (2 if task == "question-answering" else 3, 1)
    assert [there["class"]] == written["architectures"]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("roberta guesses words", {}),
        ("bert by relu", dict(task="sequence-classification", fresh_head=jax.random.key(0))),
    ],
)
def test_an_encoder_is_loaded_straight_onto_a_mesh(saved, case, options, monkeypatch):
    from lora_jax.hf.checkpoint import safetensors

    _, directory = saved(case)
    want = models.load_encoder(directory, **options).params
    sizes, read = [], safetensors.read_array

    def count(*args, **part):
        sizes.append(read(*args, **part).size)
        return read(*args, **part)

    monkeypatch.setattr(safetensors, "read_array", count)
    mesh = models.make_mesh(fsdp=8)
    load_it: Any = models.load_encoder if options else models.load
    with warnings.catch_warnings():  # tables of two rows, and a head of two classes
        warnings.filterwarnings("ignore", "every device holds all of", UserWarning)
        found = load_it(directory, mesh=mesh, **options).params
        placed = lora.sharding.place(want, mesh, models.sharding.RULES)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), found, want)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, found, placed))
    vocabulary = found[next(iter(found.keys() & {"bert", "roberta"}))]["embeddings"]
    table = vocabulary["word_embeddings"]["embedding"]
    assert max(sizes) <= table.size // 8


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_an_untied_head_of_words_is_refused(kind):
    raw = {**(MODERN if kind == "modernbert" else SIZES), "model_type": kind}
    with pytest.raises(ValueError, match='`tie_word_embeddings` must be true, .* task="features"'):
        models.BertConfig.from_hf({**raw, "tie_word_embeddings": False}, task="masked-lm")
