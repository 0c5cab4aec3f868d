"""Writes an adapter in another format, or merged into its model."""

from pathlib import Path

from lora_jax.config.arguments import SettingsError
from lora_jax.files import check_new
from lora_jax.models.requantizing import Requantized, save_requantized
from lora_jax.models.saving import save_merged
from lora_jax.recipes import convert
from lora_jax.recipes.finetune import BLOCK, hub_name, load_adapter, load_model
from lora_jax.recipes.forms import carry_form, read_trained
from lora_jax.recipes.settings import Dtype


def export_adapter(
    source: str,
    adapter: str | Path,
    output: Path,
    *,
    to: str = "peft",
    dtype: str = "float32",
    model_dtype: Dtype = "float32",
    step: int | None = None,
    quantize: str | None = None,
    quantize_block: int = BLOCK,
) -> None:
    """Loads an adapter of any format onto its model and writes it in another format.

    Args:
      source: the model it is for, as for `load_model`.
      adapter: a PEFT directory, a GGUF LoRA file, the folder of a run (its newest checkpoint), or
        a folder of `lora_jax.checkpoint.save`.
      output: the directory or file to write.
      to: the format, a name in `lora_jax.recipes.adapter_formats.ADAPTER_FORMATS`.
      dtype: dtype of the tensors in a GGUF file or a merged model.
      model_dtype: the dtype the adapter was trained in.
      step: of a run; the newest by default.
      quantize, quantize_block: the quantization of the base in training (QLoRA). A merged model
        then has the dequantized weights.

    Raises:
      FileNotFoundError: there is no adapter.
      ValueError: it is for another model, dtype or quantization, or the format cannot hold it.
    """
    # Before the model is loaded, as that takes a while.
    convert.check_source(adapter, step=step)
    convert.check_output(output, to=to, source=adapter)
    model = load_model(
        source, dtype=model_dtype, quantize=quantize, quantize_block=quantize_block,
        head=read_trained(adapter),
    )  # fmt: skip
    params, config = load_adapter(model, adapter, step=step)
    convert.save_adapter(
        model, params, config, output, to=to, base_model_name=hub_name(source), dtype=dtype
    )
    carry_form(adapter, output)


def merge_adapter(
    source: str,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    quantize_block: int = BLOCK,
    requantize: bool = False,
) -> Requantized | None:
    """Merges an adapter into its model and writes the model as a Hugging Face directory.

    Args:
      source: the model, as for `load_model`.
      adapter: a PEFT directory.
      output: the directory to write; nothing may be there yet.
      dtype: of the weights that are written.
      quantize, quantize_block: as for `export_adapter`: the model that the adapter was trained
        on is the one whose weights were quantized.
      requantize: write it in the quantized format of the base, by default its file's: a directory,
        or a .gguf file if the base is one.

    Returns:
      With `requantize`, the error that rounding to the format made.

    Raises:
      FileExistsError: there is something at `output`.
      ValueError: the adapter is for another model, or the sum is not finite.
    """
    output = Path(output)
    check_new(output)
    if output.suffix == ".gguf" and not requantize:
        raise SettingsError(
            f"`output` {output} ends as a GGUF file, and a merge in floats writes a directory: "
            "name one, or add requantize=True for a base that is a .gguf file"
        )
    # In float32, whatever is written: the sum is rounded once.
    head = read_trained(adapter)
    quantize = "file" if requantize and quantize is None else quantize
    model = load_model(source, quantize=quantize, quantize_block=quantize_block, head=head)
    params, _ = load_adapter(model, adapter)
    if requantize:
        found = save_requantized(output, model, params, dtype=dtype)
    else:
        found = save_merged(output, model, params, dtype=dtype)
    carry_form(adapter, output)
    return found
