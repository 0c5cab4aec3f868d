"""An indexed adapter as the content of a PEFT directory, checked against its config."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.array import (
    LoraArray,
    RowsArray,
    SavedArray,
    check_whole,
    is_lora,
    leaves_by_path,
)
from lora_jax.config import matching
from lora_jax.config.arguments import check_argument, quoted
from lora_jax.config.lora import ALL_LINEAR, LoraConfig
from lora_jax.config.starts import base_change
from lora_jax.hf.peft import directory
from lora_jax.hf.peft.card import (
    OF_TEXTS,
    OF_WORDS,
    TASK_TYPES,
    WRAPPED,
    is_decoder,
    is_encoder,
    is_encoder_decoder,
    parts_of,
)
from lora_jax.hf.peft.index import (
    AdapterIndex,
    IndexRow,
    make_index,
    named_targets,
    with_fused_experts,
)
from lora_jax.hf.peft.tensors import TensorSpec, read_leaf, tensor_specs
from lora_jax.hf.peft.tying import HEAD, check_shared, tied_config, ties
from lora_jax.multi.single import check_single
from lora_jax.paths import bare, module_of

AUTO = "auto"


def to_peft(
    lora_params: Any, config: LoraConfig, *, model_type: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of a PEFT directory: the config's fields and the tensors by name.

    `model_type` as for `save_peft`.

    Raises:
      ValueError: as `save_peft`.
    """
    check_argument("hf.to_peft(lora_params, config)", "config", config, LoraConfig)
    check_whole(lora_params)
    check_single(lora_params)
    leaves = leaves_by_path(lora_params)
    index = make_index(leaves, with_fused_experts(leaves, config, model_type))
    return content_of(index, model_type=model_type)


def with_task(
    leaves: Mapping[str, Any],
    config: LoraConfig,
    task_type: str | None,
    *,
    model_type: str | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As `to_peft`, with the field `task_type` and what it takes.

    Args:
      leaves: leaves by path, in Hugging Face's terms.
      config: the config they were made with.
      task_type, model_type: as for `save_peft`.

    Raises:
      ValueError: as `save_peft`.
    """
    if task_type == AUTO:
        task_type = config.extra.get("task_type", AUTO)
    # PEFT ties head and embedding of decoders; an encoder's head is a matrix of its own.
    if task_type == "CAUSAL_LM" or (task_type == AUTO and not is_encoder(leaves)):
        config = tied_config(leaves, config)
    config = with_fused_experts(leaves, config, model_type)
    fields, tensors = content_of(make_index(leaves, config), model_type=model_type)
    check_shared(tensors, leaves, "lora_params")
    if task_type == AUTO:
        task_type = task_of(leaves, tensors)
    _check_head(task_type, leaves, tensors)
    return {**fields, "task_type": task_type}, tensors


def content_of(
    index: AdapterIndex, *, model_type: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As `to_peft`, of an adapter that is indexed already."""
    config = index.config
    if base_change(config.init) == "unrepeatable":
        raise ValueError(
            f'lora_params: their start, init="{config.init}", changed the base weights in a way '
            "that a reader of the adapter cannot repeat; save the merged model (`lora.merge`) "
            "instead"
        )
    if not any(row.rank for rows in index.rows.values() for row in rows):
        raise ValueError(
            "lora_params: no leaf has an adapter that the config describes; pass the tree that "
            "`lora.init` made with this config"
        )
    tensors = {}
    for path, specs in tensor_specs(index, model_type=model_type).items():
        _check_ranks(index.rows[path])
        host, found = read_leaf(index.leaves[path], specs)
        _check_agreement(host, index.rows[path], config, specs)
        tensors |= {spec.key: _as_peft(found[spec.key], spec) for spec in specs}
    # PEFT would load NaN without an error, and every output would be NaN.
    for name, value in tensors.items():
        directory.check_tensor(name, value, "lora_params")
    fields = config.to_peft()
    if any(name.startswith(WRAPPED) for name in index.adapted) and not _is_exact(config):
        # PEFT would adapt the vision tower too, whose modules have the same last names.
        fields["target_modules"] = sorted(index.adapted)
    elif (
        config.target_modules == ALL_LINEAR
        or any(
            matching.is_target(config, name) or matching.is_target(config, module_of(name))
            for name in index.parameters
        )
        or not all(matching.is_target(config, name) for name in index.adapted)
    ):
        # PEFT has no paths of stacked layers: names that match the same modules there.
        fields["target_modules"] = named_targets(index)
        if ties(config) and HEAD in config.target_modules:
            # The tree has no such module; for PEFT the entry ties head and embedding.
            fields["target_modules"].append(HEAD)
    _warn_of_bare_targets(index)
    return fields, tensors


def _warn_of_bare_targets(index: AdapterIndex) -> None:
    """Warns of entries of `target_modules` whose modules in the tree have no adapter."""
    targets = index.config.target_modules
    held = (*index.adapted, *index.parameters, *map(module_of, map(bare, index.rows)))
    rest = [
        entry
        for entry in (() if isinstance(targets, str) else targets)
        if not any(matching.ends_with(name, entry) for name in held)
    ]
    frozen = (module_of(bare(path)) for path, leaf in index.leaves.items() if not is_lora(leaf))
    plain = {name for name in frozen if not matching.is_excluded(index.config, name)}
    if found := [entry for entry in rest if any(matching.ends_with(x, entry) for x in plain)]:
        warnings.warn(
            f"lora_params: the modules that `target_modules` calls {quoted(found)} have no adapter "
            "in this tree, and a reader of the file looks for one: pass the config that the tree "
            "was made with",
            stacklevel=4,
        )


def _is_exact(config: LoraConfig) -> bool:
    """Whether the targets match modules of the decoder alone, not of the vision tower."""
    targets = config.target_modules
    listed = (targets,) if isinstance(targets, str) else targets
    return all("language_model" in entry for entry in listed)


def _as_peft(tensor: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """PEFT keeps adapters in float32, and base weights and saved modules in their own dtype."""
    return tensor if spec.part in ("w", "value") else tensor.astype(np.float32, copy=False)


def _check_agreement(
    leaf: Any, rows: Sequence[IndexRow], config: LoraConfig, specs: Sequence[TensorSpec]
) -> None:
    """The file with its config gives PEFT the same numbers as the leaf."""
    if isinstance(leaf, SavedArray):
        _check_saved(leaf, rows[0].path, specs)
    elif isinstance(leaf, RowsArray):
        _check_rows(leaf, rows[0].path, config)
    else:
        _check_parts(leaf, rows[0].path, config)
        for row in rows:
            _check_beyond(leaf, row)
            if row.rank:
                _check_scale(leaf, row)


def _check_parts(leaf: LoraArray, path: str, config: LoraConfig) -> None:
    if (leaf.bias is not None) != config.lora_bias:
        has = "has" if leaf.bias is not None else "has no"
        raise ValueError(
            f"leaf `{path}` {has} adapter's bias, but the config says lora_bias="
            f"{config.lora_bias}; use the config the adapter was made with"
        )
    if (leaf.m is not None) != config.use_dora:
        has = "has" if leaf.m is not None else "has no"
        raise ValueError(
            f"leaf `{path}` {has} DoRA magnitude, but the config says use_dora={config.use_dora}; "
            "use the config the adapter was made with"
        )


def _check_ranks(rows: Sequence[IndexRow]) -> None:
    """No layer has a higher rank than its leaf, so that every tensor can be cut out of it."""
    for row in rows:
        if row.rank and row.rank > row.leaf.rank:
            raise ValueError(
                f"leaf `{row.path}`: its rank is {row.leaf.rank}, but the config gives "
                f"`{row.name}` rank {row.rank}; use the config the adapter was made with"
            )


def _check_beyond(leaf: LoraArray, row: IndexRow) -> None:
    """The factors are zero beyond the rank that the config gives a layer."""
    # Columns of a beside rows of zeros in b have no effect, and the reverse.
    # One layer of b is (experts..., r, out...): the rank is counted from the end.
    outs = (slice(None),) * leaf.roles.count("o")
    beyond = slice(row.rank, None)
    if np.any(leaf.a[row.layer][..., beyond]) and np.any(leaf.b[row.layer][(..., beyond, *outs)]):
        larger = f"an adapter beyond rank {row.rank}, which the config gives it"
        has = larger if row.rank else "a trained adapter, and the config does not adapt it"
        raise ValueError(
            f"leaf `{row.path}`: `{row.name}` has {has}; use the config the adapter was made with"
        )


def _check_scale(leaf: LoraArray, row: IndexRow) -> None:
    # The leaf's scale is float32, and PEFT computes its own in float64. No more than the rounding
    # is allowed: the scales are all that shows that an optimizer moved the base, as a tree does
    # not hold the base's first values.
    for scale in np.ravel(leaf.scale[row.layer]):
        if abs(scale - row.scale) > np.finfo(np.float32).eps * abs(row.scale):
            raise ValueError(
                f"leaf `{row.path}`: `{row.name}` has scale {scale:.6g}, but the config's alpha "
                f"and rank give {row.scale:.6g}, and PEFT would use that. If an "
                "optimizer ran on the whole tree, the base has moved too: train "
                "`lora.split(lora_params)[0]`, or wrap the optimizer in `lora.masked`. Otherwise "
                "change `alpha` (or `alpha_pattern`), or multiply b by the ratio"
            )


def _check_saved(leaf: SavedArray, path: str, specs: Sequence[TensorSpec]) -> None:
    """Nothing that was trained is left out of the file."""
    # Layers that the config does not name must still have their first values.
    unwritten = np.ones(leaf.shape, bool)
    for spec in specs:
        unwritten[spec.layer] = False
    trains = np.full(leaf.shape, leaf.only is None)
    for place in leaf.only or ():
        trains[place] = True
    if np.any(unwritten & trains & (np.asarray(leaf.value) != np.asarray(leaf.w))):
        raise ValueError(
            f"leaf `{path}` was trained, but the config's `bias` and `modules_to_save` do not mean "
            "it (or some of its layers); use the config the adapter was made with"
        )


def _check_rows(leaf: RowsArray, path: str, config: LoraConfig) -> None:
    """The rows that train are the config's: PEFT's file does not name them."""
    wanted = config.trainable_token_indices
    lists = wanted.values() if isinstance(wanted, Mapping) else [wanted]
    if leaf.ids not in [tuple(ids) for ids in lists]:
        raise ValueError(
            f"leaf `{path}`: its trained rows {list(leaf.ids)[:8]} are not those of the config's "
            f"`trainable_token_indices` {wanted!r}; use the config the adapter was made with"
        )


# The modules of classifiers' heads that PEFT takes for trained.
_HEADS = ("classifier", "score")


def task_of(paths: Collection[str], tensors: Collection[str]) -> str | None:
    """The task type of a model.

    Args:
      paths: of the model's leaves.
      tensors: PEFT's names of the tensors in the file.

    Returns:
      "CAUSAL_LM" for a decoder under Hugging Face's names, "SEQ_2_SEQ_LM" for T5; "SEQ_CLS",
      "TOKEN_CLS" or "QUESTION_ANS" for a model with such a head, where its head is written too, as
      PEFT expects of these types; "FEATURE_EXTRACTION" without a head; None (any model) otherwise:
      for a model of one's own, or with the head of a masked language model.
    """
    parts = parts_of(paths)
    if is_encoder_decoder(parts):
        return "SEQ_2_SEQ_LM"
    if not is_encoder(paths):
        head = next((name for name in ("score", "qa_outputs") if name in parts), None)
        written = head is None or head in parts_of(tensors)
        return _of_decoder(paths, head) if is_decoder(parts) and written else None
    if "tok_embeddings" in parts:
        # ModernBERT's heads of texts, tokens and answers have the same modules.
        return None if "head" in parts else "FEATURE_EXTRACTION"
    if "classifier" in parts:
        found = "SEQ_CLS" if OF_TEXTS & parts else "TOKEN_CLS"
        return found if "classifier" in parts_of(tensors) else None
    if "qa_outputs" in parts:
        return "QUESTION_ANS" if "qa_outputs" in parts_of(tensors) else None
    return None if OF_WORDS & parts else "FEATURE_EXTRACTION"


def _of_decoder(paths: Collection[str], head: str | None) -> str:
    """The task of a decoder with such a head: the one of tokens has a bias."""
    if head == "score":
        return "TOKEN_CLS" if any(path.endswith("score.bias") for path in paths) else "SEQ_CLS"
    return "CAUSAL_LM" if head is None else "QUESTION_ANS"


def _check_head(task_type: str | None, paths: Collection[str], tensors: Collection[str]) -> None:
    """PEFT takes the heads of classifiers for trained, and refuses a file without them.

    Raises:
      ValueError: the file would lack a head.
    """
    if task_type not in TASK_TYPES:
        known = ", ".join(map(str, TASK_TYPES))
        raise ValueError(f"`task_type` must be one of {known}, got {task_type!r}")
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return
    for head in _HEADS:
        if head in parts_of(paths) - parts_of(tensors):
            raise ValueError(
                f'task_type "{task_type}": PEFT would look for the head `{head}` in the file; '
                f'train it too, modules_to_save=("{head}",), or pass task_type=None'
            )
