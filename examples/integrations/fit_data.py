"""grain and Hugging Face datasets as training data for `lora_jax.train.fit`."""

import datasets
import grain
import jax
import numpy as np

import lora_jax as lora
from lora_jax import models, train

ROWS = [{"question": f"{a} plus {b}?", "reply": str(a + b)} for a in range(4) for b in range(4)]
FIELDS = {"prompt": "question", "completion": "reply"}


def records(rows):
    """Records of dicts; what names a row in an error is its number."""
    return [train.record_of(r, source=f"row {i}", fields=FIELDS) for i, r in enumerate(rows)]


def main():
    model = models.load(models.find_smollm2())
    # `datasets`: any table of columns, mapped and filtered by its own functions.
    table = datasets.Dataset.from_list(ROWS).filter(lambda row: row["reply"] != "0")
    # grain: shuffled, mapped; a finite pass over it is a sequence of rows.
    pipeline = grain.MapDataset.source(ROWS).seed(0).shuffle().filter(lambda r: r["reply"] != "0")
    found = {}
    for name, rows in {"datasets": table, "grain": pipeline.to_iter_dataset()}.items():
        data = train.examples(records(rows), model.tokenizer, max_length=64)
        config = lora.LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
        tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
        plan = lora.plan(config, model.apply, model.params, tokens)
        lora_params = lora.init(jax.random.key(0), plan, model.params)
        settings = train.TrainConfig(steps=6, batch_size=4, learning_rate=5e-3, progress=False)
        result = train.fit(model, lora_params, data, None, settings)
        losses = [line["loss"] for line in result.history if line["kind"] == "train"]
        found |= {f"{name}_rows": len(data), f"{name}_losses": [losses[0], losses[-1]]}
    return found


if __name__ == "__main__":
    print(main())
