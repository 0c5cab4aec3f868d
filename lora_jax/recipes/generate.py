"""Text generation: tokenizes prompts, runs `models.generate` and decodes the result."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import models
from lora_jax.compat import moved
from lora_jax.config.arguments import SettingsError, check_argument
from lora_jax.models.registry import ENCODER, ENCODER_DECODER, IMAGE_ENCODER, kind_of_model
from lora_jax.recipes.forms import FORM_FILE, TrainedForm
from lora_jax.recipes.settings import GenerateConfig
from lora_jax.train.evaluate import check_texts, tokenizer_of

Messages = Sequence[Mapping[str, Any]]

# Settings of generation_config.json that are not applied here, with the value at which they change
# nothing: those of sampling, and those that also change what is most likely.
_NOT_SAMPLED = {
    "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
_NOT_APPLIED = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "guidance_scale": 1.0,
    "min_length": 0, "min_new_tokens": 0, "suppress_tokens": [], "begin_suppress_tokens": [],
    "bad_words_ids": [], "sequence_bias": {}, "stop_strings": [], "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}  # fmt: skip
_TRAINED_ON = {
    "prompt": "prompts and completions",
    "text": "texts",
    "messages": "messages of the chat template",
}

__getattr__ = moved(
    __name__,
    {
        "AnswerConfig": "lora_jax.recipes.generate:GenerateConfig",
        "answer": "lora_jax.recipes.generate:generate_texts",
        "as_question": "lora_jax.recipes.generate:as_messages",
    },
)


class Sampling(NamedTuple):
    """How tokens are chosen, see `lora_jax.models.generate`."""

    temperature: float
    top_p: float


def as_messages(text: str, *, system: str | None = None) -> Messages:
    """The chat messages of one user prompt, after a system message if given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def as_trained(
    prompts: Sequence[str],
    *,
    chat: bool,
    form: TrainedForm | None,
    adapter: bool = False,
    raw: bool | None = None,
    system: str | None = None,
    trained_system: str | None = None,
) -> list[Messages | str]:
    """The questions of some prompts, in the form that the adapter was trained on.

    Args:
      prompts: the texts.
      chat: whether the tokenizer has a chat template.
      form: what the adapter was trained on (`read_form`), None if it is not known.
      adapter: whether there is an adapter.
      raw: continue the prompts as they are, or put them as chat messages; None takes the form of
        the training, or the chat template where there is one.
      system: the system message before each prompt; None takes that of the training.
      trained_system: the system message that all chats of the training began with.

    Raises:
      ValueError: a system message for prompts that are continued as they are.

    Warns:
      UserWarning: the questions have another form than the training, or it is not known which of
        the two it had.
    """
    check_texts("prompts", prompts)
    # Texts and prompts were seen as they are. After a mixture both forms are right.
    trained_raw = None if form in (None, "mixed") else form != "messages"
    chosen = raw if raw is not None else not chat if trained_raw is None else trained_raw
    if trained_raw is not None and chosen != trained_raw:
        warnings.warn(
            f"the adapter was trained on {_TRAINED_ON[form or '']}, and the prompts are "
            f"{'continued as they are' if chosen else 'put through the chat template'}: leave "
            f"out raw={chosen}",
            stacklevel=2,
        )
    # Without a chat template there is one form only, and a flag or a system message chooses one.
    if adapter and form is None and chat and raw is None and system is None:
        warnings.warn(
            f"the adapter has no {FORM_FILE}, so the form of its training is not known, and the "
            "prompts are put through the chat template: pass raw=True if it was trained on bare "
            "texts or prompts, raw=False if on chat messages",
            stacklevel=2,
        )
    if chosen and system is not None:
        raise ValueError(
            "`system` is for chat messages, and the prompts are continued as they are, without a "
            "chat template: put its text into the prompt"
        )
    system = trained_system if system is None else system
    return [text if chosen else as_messages(text, system=system) for text in prompts]


def generate_texts(
    model: Any,
    params: Any,
    questions: Sequence[Messages | str],
    config: GenerateConfig,
    *,
    first: int = 0,
    stream: Callable[[int, str], None] | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[str]:
    """Generates an answer to each prompt.

    Args:
      model: from `lora_jax.models.load`, with a tokenizer.
      params: its parameters, with or without adapters.
      questions: each is the messages of a chat so far, or a text to continue as it is.
      config: options of the generation.
      first: number of the first question. What is sampled for a question depends on the seed and
        its number, not on the batches.
      stream: called with an index of `questions` and what has been added to its answer. The texts
        joined are the answer but for its end, which may still change, and for characters that the
        tokenizer changes after they were passed on (bytes that turn out to be no text).
      template: further variables of the chat template, such as `{"enable_thinking": False}`.

    Returns:
      One text for each question, without special tokens.

    Raises:
      ValueError: the model is an encoder or has no tokenizer, or a prompt no room in its context.
    """
    if kind_of_model(model) in (ENCODER, IMAGE_ENCODER):
        raise ValueError(
            f"this `{model.config.model_type}` is an encoder, which generates no text, and has no "
            "head for a task: give an adapter or a checkpoint that has one"
        )
    tokenizer = tokenizer_of(model)
    order = "recipes.generate.generate_texts(model, params, questions, config)"
    check_argument(order, "config", config, GenerateConfig)
    check_texts("questions", questions)
    context = model.config.context
    if config.max_new_tokens >= context and kind_of_model(model) != ENCODER_DECODER:
        raise SettingsError(
            f"`max_new_tokens` is {config.max_new_tokens}, but the model's context, with the "
            f"prompt, is {context} tokens"
        )
    prompts = [_tokens(model, question, template or {}) for question in questions]
    # A chat model ends a turn with another token than a text; both are ends.
    stops = sorted({*model.config.eos_token_ids, *tokenizer.stop_ids})
    sampling = sampling_of(config, model.generation)
    # Each question has its own key: equal prompts are sampled differently.
    key = jax.random.key(config.seed)
    numbers = first + np.arange(len(prompts))
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers) if sampling.temperature else None
    answers = []
    for start in range(0, len(prompts), config.batch_size):
        rows = slice(start, start + config.batch_size)
        answers += models.generate(
            model,
            params,
            prompts[rows],
            max_new_tokens=config.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_tokens=stops,
            key=None if keys is None else keys[rows],
            stream=None if stream is None else _as_text(tokenizer, start, stream),
        )
    return [tokenizer.decode(tokens) for tokens in answers]


def _as_text(
    tokenizer: Any, start: int, stream: Callable[[int, str], None]
) -> Callable[[list[list[int]]], None]:
    """A function of new tokens of a batch that passes on what is new in the texts.

    Args:
      tokenizer: of the model.
      start: number of the batch's first question.
      stream: as for `generate_texts`.
    """
    tokens: dict[int, list[int]] = {}
    texts: dict[int, str] = {}

    def take(new: list[list[int]]) -> None:
        for number, row in enumerate(new, start):
            tokens[number] = [*tokens.get(number, []), *row]
            # All tokens are decoded again: what one stands for depends on those before it. A
            # character of several tokens ends in U+FFFD until the last of them is there.
            text = tokenizer.decode(tokens[number]).rstrip("\ufffd")
            before = texts.get(number, "")
            if len(text) > len(before) and text.startswith(before):
                texts[number] = text
                stream(number, text[len(before) :])

    return take


def answer_prompts(
    model: Any,
    params: Any,
    prompts: Iterable[str],
    config: GenerateConfig,
    *,
    question: Callable[[str], Messages | str],
    write: Callable[[str], None],
    live: bool,
    labels: bool,
    template: Mapping[str, Any] | None = None,
) -> None:
    """Answers prompts in their order and writes the answers, each followed by a line break.

    Args:
      model, params, config: as for `generate_texts`.
      prompts: the texts; an iterator is read as far as the next answers need it.
      question: the messages or text of a prompt.
      write: receives parts of the output.
      live: answer one prompt at a time and write its tokens as they come; otherwise whole answers,
        a batch at a time.
      labels: write each prompt above its answer, and an empty line after it.
      template: as for `generate_texts`.
    """
    left, first, run = iter(prompts), 0, partial(generate_texts, template=template)
    gap = "\n\n" if labels else "\n"
    # Not all prompts are read at once: whoever sends them may wait for an answer first. Live, a
    # batch would only delay that answer.
    while some := list(islice(left, 1 if live else config.batch_size)):
        questions = [question(prompt) for prompt in some]
        heads = [f"> {prompt}\n" if labels else "" for prompt in some]
        if live:
            # Before the prompt is read and its first token compiled, which takes seconds.
            write(heads[0])
            _answer_live(run, model, params, questions, config, first=first, write=write)
            write(gap)
        else:
            answers = run(model, params, questions, config, first=first)
            for head, answer in zip(heads, answers, strict=True):
                write(head + answer + gap)
        first += len(some)


def _answer_live(
    run: Callable[..., list[str]],
    model: Any,
    params: Any,
    questions: Sequence[Messages | str],
    config: GenerateConfig,
    *,
    first: int,
    write: Callable[[str], None],
) -> None:
    """Writes the answer to one question as it comes."""
    shown = ""

    def stream(_: int, text: str) -> None:
        nonlocal shown
        shown += text
        write(text)

    (answer,) = run(model, params, questions, config, first=first, stream=stream)
    # Where the tokenizer changed what was written, the whole answer stands below it.
    write(answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}")


def sampling_of(config: GenerateConfig, generation: Mapping[str, Any]) -> Sampling:
    """The options of a generation, with the model's own where the config has none.

    Args:
      config: the options.
      generation: the model's generation_config.json.

    Raises:
      ValueError: the model's temperature or top-p is out of range.

    Warns:
      UserWarning: the model's own generation has settings that are not applied.
    """
    sampled = generation.get("do_sample") is True
    temperature, top_p = config.temperature, config.top_p
    if temperature is None:
        # transformers ignores the sampling settings of a model with `do_sample` false.
        temperature = generation.get("temperature") or 1.0 if sampled else 0.0
        known = (_NOT_SAMPLED if sampled else {}) | _NOT_APPLIED
        left = [n for n, none in known.items() if generation.get(n) not in (None, none)]
        if left:
            warnings.warn(
                "generation_config.json's "
                f"{', '.join(f'`{n}` = {generation[n]}' for n in left)} is not applied; give "
                "`temperature`, 0 for the most likely tokens, to generate without it",
                stacklevel=3,
            )
    if top_p is None:
        top_p = generation.get("top_p") or 1.0 if sampled else 1.0
    # Checked as a config's own.
    checked = GenerateConfig(temperature=temperature, top_p=top_p)
    return Sampling(checked.temperature or 0.0, 1.0 if checked.top_p is None else checked.top_p)


def _tokens(model: Any, question: Messages | str, template: Mapping[str, Any]) -> list[int]:
    tokenizer = model.tokenizer
    if isinstance(question, str):
        # An encoder reads a whole text, its end included.
        whole = kind_of_model(model) == ENCODER_DECODER
        return list(tokenizer.encode(question) if whole else tokenizer.encode_prompt(question))
    return list(tokenizer.apply_chat_template(question, add_generation_prompt=True, **template))
