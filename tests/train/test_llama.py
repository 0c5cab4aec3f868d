"""`fit` on the Llama family: scanned layers, dropout, adapters on the tied table, chat data."""

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import train
from lora_jax.models import LlamaConfig

from tests.support.train_toys import compiled_once, numbers

pytestmark = [pytest.mark.once, pytest.mark.slow]

VOCAB = 40
TINY = LlamaConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
EVERYWHERE = lora.LoraConfig(
    rank=2, alpha=4, target_modules=("q_proj", "down_proj", "embed_tokens"), dropout=0.1
)


def counting(count=24):
    """Sequences that go on by a fixed stride: what follows is known after two tokens."""
    rng = np.random.default_rng(0)
    made = []
    for n in rng.integers(6, 24, count):
        tokens = (rng.integers(VOCAB) + rng.integers(1, 3) * np.arange(n)) % VOCAB
        made.append(train.Example(tokens.astype(np.int32), np.arange(n) >= 2, "counting"))
    return made


def run(output_dir=None, hooks=None, **options):
    model = lora.models.init(jax.random.key(0), TINY)
    plan = lora.plan(EVERYWHERE, model.apply, model.params, jax.ShapeDtypeStruct((1, 4), "int32"))
    params = lora.init(jax.random.key(1), plan, model.params)
    defaults = {
        "steps": 12, "batch_size": 4, "accumulation": 2, "learning_rate": 0.03, "buckets": 1,
        "save_every": 5, "progress": False,
    }  # fmt: skip
    config = train.TrainConfig(output_dir=output_dir, **{**defaults, **options})
    data = counting()
    result = train.fit(model, params, data, data[:8], config, lora_config=EVERYWHERE, hooks=hooks)
    return model, result


class Stopped(Exception):
    """Stands for whatever may end a run from outside."""


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def whole():
    return run()


def test_llama_learns_and_resumes_to_the_bit(tmp_path, whole):
    model, expected = whole
    evals = [r["eval_loss"] for r in expected.history if r["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.2

    def stop(record):
        if record["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, train.Hooks(record=stop))
    _, resumed = run(tmp_path, resume=True)
    assert numbers(resumed.history) == numbers(expected.history)
    jax.tree.map(np.testing.assert_array_equal, resumed.lora_params, expected.lora_params)

    # And the run's folder is an adapter: read over the base, it is the trained tree.
    restored, config = lora.checkpoint.restore(
        tmp_path, model.apply, model.params, np.zeros((1, 4), np.int32)
    )
    assert config == EVERYWHERE
    jax.tree.map(np.testing.assert_array_equal, restored, expected.lora_params)


def test_eval_loss_is_that_of_whole_logits(whole):
    model, result = whole
    forward = jax.jit(lora.lorafy(model.apply))
    total, count = 0.0, 0
    tokens = np.zeros((8, 24), np.int32)
    for row, example in enumerate(counting()[:8]):
        tokens[row, : len(example.tokens)] = example.tokens
    logits = np.asarray(forward(result.lora_params, tokens), np.float64)
    for row, example in enumerate(counting()[:8]):
        for t in np.flatnonzero(example.learned):
            scores = logits[row, t - 1]
            peak = scores.max()
            total += np.log(np.exp(scores - peak).sum()) + peak - scores[example.tokens[t]]
            count += 1
    assert result.history[-1]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_smollm2_learns_the_assistants_words_and_its_end_of_turn(smollm2):
    tokenizer = lora.models.load(smollm2).tokenizer
    turns = [("user", "Hi there"), ("assistant", "Hello!\nHow?"), ("user", "Fine"),
             ("assistant", "Good.")]  # fmt: skip
    records = [
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"prompt": "Q: 1+1?\nA:", "completion": " 2"},
        {"text": "Some plain text."},
    ]
    made = train.examples([train.record_of(r) for r in records], tokenizer, max_length=99)
    spoken = [
        tokenizer.decode(e.tokens[e.learned].tolist(), skip_special_tokens=False) for e in made
    ]
    assert spoken == [
        "Hello!\nHow?<|im_end|>Good.<|im_end|>", " 2<|im_end|>", " plain text.<|im_end|>",
    ]  # fmt: skip
    whole = tokenizer.decode(made[0].tokens.tolist(), skip_special_tokens=False)
    assert whole.endswith(
        "<|im_start|>user\nFine<|im_end|>\n<|im_start|>assistant\nGood.<|im_end|>\n"
    )
