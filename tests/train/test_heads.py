"""Heads of tasks in training: loss and slopes are those of transformers' own models under PEFT."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import models
from lora_jax.hf import load_peft, save_peft
from lora_jax.recipes.fitting import with_head
from lora_jax.train import Example, TrainConfig, evaluate, fit, lora_loss
from lora_jax.train.batches import loader, once
from lora_jax.train.goals import GOALS, goal_of

from tests.support.peft_oracle import TENSORS, peft_wrote, randomize
from tests.support.torch_models import (
    DEBERTA,
    DECODER_SIZES,
    DISTIL,
    ENCODER_SIZES,
    MODERN,
    saver,
)

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "train/heads"
TEXTS, ONE, SEVERAL = "SequenceClassification", "regression", "multi_label_classification"
DECODER = dict(DECODER_SIZES, pad_token_id=96, initializer_range=0.2)
KINDS: dict[str, dict[str, Any]] = {
    "bert": ENCODER_SIZES,
    "roberta": ENCODER_SIZES,
    "electra": dict(ENCODER_SIZES, embedding_size=16),
    "distilbert": DISTIL,
    "modernbert": dict(MODERN, classifier_pooling="mean"),
    "deberta-v2": DEBERTA,
    "llama": DECODER,
    "qwen2": DECODER,
    "mistral": dict(DECODER, sliding_window=4),
    "gpt2": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=96),
}
# PEFT has no "all-linear" for tokens and answers: it wraps the head twice.
ATTENTION = ["query", "value", "intermediate.dense"]
LINEAR = ["q_proj", "v_proj", "down_proj"]
TARGETS = {
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "modernbert": ["Wqkv", "Wi"],
    "deberta-v2": ["query_proj", "value_proj", "intermediate.dense"],
    "llama": LINEAR,
    "qwen2": LINEAR,
    "mistral": LINEAR,
}
# Kind, class, classes, problem.
CASES = {
    "bert values": ("bert", TEXTS, 1, None),
    "bert several": ("bert", TEXTS, 3, SEVERAL),
    "bert tokens": ("bert", "TokenClassification", 4, None),
    "roberta two values": ("roberta", TEXTS, 2, ONE),
    "electra several": ("electra", TEXTS, 3, SEVERAL),
    "electra tokens": ("electra", "TokenClassification", 4, None),
    "distilbert tokens": ("distilbert", "TokenClassification", 4, None),
    "bert answers": ("bert", "QuestionAnswering", 2, None),
    "roberta answers": ("roberta", "QuestionAnswering", 2, None),
    "distilbert answers": ("distilbert", "QuestionAnswering", 2, None),
    "modernbert values": ("modernbert", TEXTS, 1, ONE),
    "modernbert tokens": ("modernbert", "TokenClassification", 4, None),
    "modernbert answers": ("modernbert", "QuestionAnswering", 2, None),
    "deberta several": ("deberta-v2", TEXTS, 3, SEVERAL),
    "deberta answers": ("deberta-v2", "QuestionAnswering", 2, None),
    "llama one class": ("llama", TEXTS, 3, None),
    "llama values": ("llama", TEXTS, 1, None),
    "llama several": ("llama", TEXTS, 3, SEVERAL),
    "llama tokens": ("llama", "TokenClassification", 4, None),
    "llama answers": ("llama", "QuestionAnswering", 2, None),
    "qwen2 answers": ("qwen2", "QuestionAnswering", 2, None),
    "mistral answers": ("mistral", "QuestionAnswering", 2, None),
    "gpt2 values": ("gpt2", TEXTS, 1, ONE),
}
QUICK = ("deberta answers", "modernbert tokens", "llama several")
LENGTHS = (12, 7, 5)
TYPES = {"TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    fields = {}
    for case, (kind, ending, count, problem) in CASES.items():
        more = {} if ending == "QuestionAnswering" else {"num_labels": count}
        more |= {} if problem is None else {"problem_type": problem}
        fields[case] = {
            **KINDS[kind], "model_type": kind, "auto": f"AutoModelFor{ending}", **more,
            "initializer_range": 0.1,
        }  # fmt: skip
    return saver(PLACE, fields, tmp_path_factory)


def rows_of(case: str, typed: bool) -> list[Example]:
    """Three texts of several lengths, with random targets."""
    _, ending, count, problem = CASES[case]
    rng, rows = np.random.default_rng(3), []
    for length in LENGTHS:
        tokens = rng.integers(4, 90, length).astype(np.int32)
        learned = np.arange(length) == length - 1
        if ending == "TokenClassification":
            learned = np.arange(length) % 3 != 2
            targets = rng.integers(0, count, learned.sum()).astype(np.int32)
        elif ending == "QuestionAnswering":
            targets = np.array([[1 + length // 3, 1 + length // 2]], np.int32)
        elif problem == SEVERAL:
            targets = rng.integers(0, 2, (1, count)).astype(np.float32)
        elif problem == ONE or count == 1:
            targets = rng.normal(size=(1, count)).astype(np.float32)
        else:
            targets = rng.integers(0, count, 1).astype(np.int32)
        types = (np.arange(length) >= 3).astype(np.int32)
        rows.append(Example(tokens, learned, "row", targets, types if typed else None))
    return rows


def labels_of(row: Example, ending: str, width: int) -> dict[str, np.ndarray]:
    """The labels of a text as transformers takes them, of a padded row."""
    assert row.targets is not None
    if ending == "TokenClassification":
        labels = np.full(width, -100)
        labels[: len(row.tokens)][row.learned] = row.targets
        return {"labels": labels}
    if ending == "QuestionAnswering":
        return dict(zip(("start_positions", "end_positions"), row.targets[0], strict=True))
    return {"labels": row.targets[0]}


def theirs(model, rows: list[Example], ending: str, pad: int) -> dict:
    """PEFT's losses of a padded batch and of each text alone, and the slopes of its adapters.

    Of answers the slopes are those of texts alone: transformers takes padding for a candidate.
    """
    import peft
    import torch

    def loss(some, width):
        tokens = np.full((len(some), width), pad)
        types = np.zeros_like(tokens)
        for i, row in enumerate(some):
            tokens[i, : len(row.tokens)] = row.tokens
            types[i, : len(row.tokens)] = 0 if row.types is None else row.types
        each = [labels_of(row, ending, width) for row in some]
        labels = {name: torch.tensor(np.stack([x[name] for x in each])) for name in each[0]}
        labels = {n: x if x.is_floating_point() else x.long() for n, x in labels.items()}
        mask = np.arange(width) < np.array([[len(row.tokens)] for row in some])
        typed = {} if some[0].types is None else {"token_type_ids": torch.tensor(types)}
        # PEFT's own class for answers does not hand `token_type_ids` on.
        return (model.base_model if ending == "QuestionAnswering" else model)(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), **typed,
            **labels,
        ).loss  # fmt: skip

    whole = loss(rows, max(LENGTHS))
    alone = [loss([row], len(row.tokens)) for row in rows]
    (sum(alone) / len(alone) if ending == "QuestionAnswering" else whole).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    state = peft.get_peft_model_state_dict(model)
    return {
        "padded": whole.item(),
        "alone": [x.item() for x in alone],
        "slopes": {name: value.detach().numpy() for name, value in sorted(state.items())},
    }


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_loss_and_slopes_are_pefts(saved, case, tmp_path):
    """On a padded batch and on texts alone."""
    there, directory = saved(case)
    kind, ending, _, _ = CASES[case]
    base = models.load(directory)
    rows = rows_of(case, getattr(base.config, "typed", False))
    targets = "all-linear" if ending == TEXTS else TARGETS.get(kind, ATTENTION)
    task = TYPES.get(ending, "SEQ_CLS")
    fields: dict[str, Any] = dict(r=2, target_modules=targets, task_type=task)
    if kind == "gpt2":
        fields["fan_in_fan_out"] = True
    noise = partial(randomize, scale=0.1)
    ask = partial(theirs, rows=rows, ending=ending, pad=base.config.pad_token_id)
    want = peft_wrote(f"{PLACE}/{case}", tmp_path / "a", there, fields, ask, randomized=noise)
    tokens = np.ones((1, 4), np.int32)
    params, config = load_peft(tmp_path / "a", base.apply, base.params, tokens, model_type=kind)

    goal = goal_of(base.config)
    assert goal is not None
    counts = [len(row.targets) for row in rows if row.targets is not None]
    mean = np.average(want["alone"], weights=counts)
    # float32, of a batch of another shape.
    np.testing.assert_allclose(evaluate(base, params, rows, batch_size=2), mean, atol=1e-4)
    if goal.per != "answer":
        np.testing.assert_allclose(want["padded"], mean, atol=1e-4)
    for row, one in zip(rows, want["alone"], strict=True):
        np.testing.assert_allclose(evaluate(base, params, [row], batch_size=1), one, atol=1e-4)

    pad = base.config.pad_token_id
    (batch,) = once(loader(rows, batch_size=3, buckets=1, pad_id=pad, segmented=True))
    (batch,) = [jax.tree.map(lambda x: x[0], batch)]
    trainable, frozen = lora.split(params)
    slopes = jax.grad(lora_loss(base))(trainable, frozen, batch, None)
    slopes = jax.tree.map(lambda x: x / sum(counts), slopes)
    save_peft(tmp_path / "b", lora.combine(slopes, frozen), config, model_type=kind)
    got = load_file(tmp_path / "b" / TENSORS)
    assert got.keys() == want["slopes"].keys()
    for key, value in want["slopes"].items():
        np.testing.assert_allclose(got[key], value, atol=1e-4, err_msg=key)


def test_scores_of_evaluation_data():
    found = np.eye(3)[[0, 1, 1, 0, 2]]
    score = GOALS["token-classification"].score
    assert score is not None
    # Of A and B three are found, four are there, and two are right.
    got = score(found, np.array([0, 1, 2, 1, 2]), ("O", "A", "B"))
    assert got == {"accuracy": 3 / 5, "F1": 2 * 2 / (3 + 4)}
    score = GOALS[SEVERAL].score
    assert score is not None
    logits, wanted = np.array([[0.3, -1], [2, -0.2]]), np.array([[1.0, 0], [1, 1]])
    assert score(logits, wanted, ("A", "B")) == {"micro-F1": 2 * 2 / (2 + 3)}
    score = GOALS[ONE].score
    assert score is not None
    x, y = np.random.default_rng(0).normal(size=(2, 9, 1))
    got = score(x, y, ("A",))
    assert got["MSE"] == pytest.approx(np.square(x - y).mean())
    assert got["Pearson"] == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1])
    assert np.isnan(score(x, np.ones((9, 1)), ("A",))["Pearson"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["bert several", "bert tokens", "distilbert answers", "llama values", "llama answers"]
)
def test_a_mesh_gives_the_losses_of_one_device(saved, case):
    """Also where the tokens of a row are spread; losses of four steps."""
    _, directory = saved(case)
    found = []
    meshes: list[dict[str, int]] = [{}, {"data": 2, "fsdp": 2}, {"data": 2, "context": 2}]
    for sizes in meshes:
        mesh = models.make_mesh(**sizes, devices=jax.devices()[:4]) if sizes else None
        model = models.load(directory, mesh=mesh)
        config = with_head(model, lora.LoraConfig(rank=2))
        plan = lora.plan(config, model.apply, model.params, np.ones((1, 4), np.int32))
        params = lora.init(jax.random.key(0), plan, model.params)
        rows = rows_of(case, getattr(model.config, "typed", False)) * 3
        run = TrainConfig(steps=4, batch_size=4, accumulation=2, learning_rate=0.01, progress=False)
        result = fit(model, params, rows, None, run, lora_config=config)
        found.append([line["loss"] for line in result.history if "loss" in line])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)
