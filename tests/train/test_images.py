"""Vision transformers that learn to classify images: by `fit`, by the command line, on a mesh."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import lora_jax as lora
from lora_jax import models, train
from lora_jax.cli import main
from lora_jax.hf.images import FILE, ImageProcessor, read_processor
from lora_jax.models.saving import save_model
from lora_jax.recipes import finetune
from lora_jax.recipes.classify import scores
from lora_jax.train import TrainConfig, fit, image_examples, load_folder, load_jsonl, record_of
from lora_jax.train.evaluate import check_causal

from tests.support.oracle import oracle
from tests.support.tiny import tiny_tokenizer
from tests.support.torch_models import saver

pytestmark = [pytest.mark.once, pytest.mark.oracle]

PLACE = "train/images"
MODELS = {
    "vit": dict(
        model_type="vit", hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, image_size=8, patch_size=4, num_labels=3, initializer_range=0.2,
        auto="AutoModelForImageClassification",
    )
}  # fmt: skip
SIZE = {"height": 8, "width": 8}
STEPS = 10
# Weight decay, clipping and a schedule are compared in test_peft_curve.py.
RUN = TrainConfig(
    steps=STEPS, batch_size=2, accumulation=2, learning_rate=1e-2, schedule="constant", warmup=0,
    weight_decay=0.0, clip=None, progress=False, tensorboard=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saver(PLACE, MODELS, tmp_path_factory)("vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images for each of two classes, brighter on the left or on the right."""
    place, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, name in enumerate(("left", "right")):
        (place / name / "inside").mkdir(parents=True)
        for i in range(4):
            pixels = draw.integers(0, 120, (9 + i, 14, 3), np.uint8)
            pixels[:, 7 * number : 7 + 7 * number] += 100
            Image.fromarray(pixels).save(place / name / ("inside" if i else "") / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def directory(base, tmp_path_factory):
    """The model with a processor, and without a trained head."""
    place, model = tmp_path_factory.mktemp("processed") / "model", models.load(base.directory)
    save_model(place, model, model.params)
    fields = {"size": 8, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (place / FILE).write_text(json.dumps(fields))
    return place


def made(mode, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (11, 6, 4), np.uint8)
    plain = Image.fromarray(pixels[..., :3])
    return {"RGBA": Image.fromarray(pixels), "P": plain.quantize(16)}.get(mode) or plain.convert(
        mode
    )


PROCESSORS = {
    "plain": {"size": SIZE},
    "bicubic": {"size": {"height": 5, "width": 9}, "resample": 3, "image_mean": [0.4, 0.5, 0.6],
                "image_std": [0.2, 0.3, 0.4]},
    "scaled": {"size": SIZE, "rescale_factor": 0.01, "do_normalize": False},
    "unscaled": {"do_resize": False, "do_rescale": False},
    "cropped": {"size": {"height": 9, "width": 10}, "do_center_crop": True,
                "crop_size": {"height": 6, "width": 5}},
    "small": {"size": 5, "do_center_crop": True, "crop_size": {"height": 8, "width": 4}},
    "one mean": {"size": [8, 5], "image_mean": 0.4, "image_std": 0.3, "default_to_square": False},
    "nulls": {"size": SIZE, "do_rescale": None, "do_normalize": None, "do_convert_rgb": True},
    "another class": {"image_processor_type": "DeiTImageProcessorFast", "size": 9, "crop_size": 6},
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_transformers(case):
    def theirs():
        from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

        kind = DeiTImageProcessorPil if case == "another class" else ViTImageProcessorPil
        run: Any = kind.from_dict({"do_convert_rgb": True, **PROCESSORS[case]})
        return {mode: run(made(mode))["pixel_values"][0] for mode in ("RGB", "RGBA", "P", "L")}

    want = oracle(f"{PLACE}/pixels.{case}", theirs)
    processor = ImageProcessor.from_hf(PROCESSORS[case])
    assert ImageProcessor.from_hf(processor.to_hf()) == processor
    for mode, pixels in want.items():
        # float32, scaled once and not twice; pixels are up to 255.
        np.testing.assert_allclose(processor(made(mode)).floats(), pixels, rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(
        processor(np.asarray(made("RGB"))).values, processor(made("RGB")).values
    )


REFUSED = {
    "a shorter edge": ({"size": {"shortest_edge": 8}}, "`size` must be a number, or height and w"),
    "no square": ({"size": 8, "default_to_square": False}, "got {'shortest_edge': 8}"),
    "no mean": ({"image_mean": "0.5"}, "`image_mean` must be a number, or a list of one a channel"),
    "padded": ({"do_pad": True, "pad_size": 9}, "field `do_pad` = True is not supported"),
    "no filter": ({"resample": 7}, "`resample` must be a number from 0 to 5, got 7"),
    "no number": ({"resample": 2.0}, "`resample` must be a number from 0 to 5, got 2.0"),
    "other channels": ({"image_mean": [0.5], "image_std": [1]}, "of 1 channels, .* `num_channels`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_processors_are_refused_by_name(tmp_path, case):
    fields, match = REFUSED[case]
    (tmp_path / FILE).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{FILE}: .*{match}"):
        read_processor(tmp_path, channels=3)


def test_one_mean_is_of_every_channel(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"size": 8, "image_mean": 0.4, "image_std": 0.3}))
    for channels in (1, 3):
        processor = read_processor(tmp_path, channels=channels)
        assert processor(made("RGB")).values.shape == (channels, 8, 8)


def test_a_photograph_is_turned_as_it_was_held(tmp_path):
    held = made("RGB").getexif()
    held[0x0112] = 6  # a quarter turn
    made("RGB").save(tmp_path / "a.png", exif=held)
    processor = ImageProcessor(size=(6, 11))
    turned = processor(made("RGB").transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(processor(tmp_path / "a.png").values, turned.values)


def arrays(config, count=12):
    """Records of what transformers' processor would return."""
    shape = (count, config.num_channels, *config.image_size)
    pixels = np.asarray(jax.random.normal(jax.random.key(0), shape))
    return [record_of({"image": x, "label": i % 3}) for i, x in enumerate(pixels)]


def adapted(model):
    config = finetune.with_head(model, lora.LoraConfig(rank=2, target_modules=["q_proj", "fc1"]))
    return config, finetune.init_adapter(model, config, seed=0)


def torch_losses(base, start, data):
    import peft
    import torch

    model = peft.PeftModel.from_pretrained(base.model(), str(start), is_trainable=True).eval()
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=RUN.learning_rate, weight_decay=0.0)
    layout, found = train.loader(data, batch_size=2, accumulation=2, epochs=STEPS), []
    for item in train.iterate(layout, STEPS):
        optimizer.zero_grad()
        images, targets = item.batch.images, item.batch.targets[item.batch.weights > 0]
        out = model(
            pixel_values=torch.tensor(images).flatten(0, 1), labels=torch.tensor(targets).long()
        )
        out.loss.backward()
        optimizer.step()
        found.append(out.loss.item())
    return found


@pytest.mark.filterwarnings("ignore")
def test_fit_follows_peft(base, tmp_path):
    model = models.load(base.directory)
    (config, params), data = adapted(model), image_examples(arrays(model.config), model)
    lora.hf.save_peft(tmp_path / "start", params, config)
    result = fit(model, params, data, data, RUN, lora_config=config)
    losses = [line["loss"] for line in result.history if line["kind"] == "train"]
    want = oracle(f"{PLACE}/losses", lambda: torch_losses(base, tmp_path / "start", data))
    assert max(want) - min(want) > 0.3
    # float32 sums in another order, over ten steps.
    np.testing.assert_allclose(losses, want, atol=1e-4, rtol=0)
    first, last = (line["eval_loss"] for line in result.history if line["kind"] == "eval")
    assert last < first
    logits = lora.lorafy(model.apply)(
        result.lora_params, np.stack([x.image.floats() for x in data])
    )
    right = np.mean(np.argmax(logits, -1) == np.arange(12) % 3)
    found = scores(model, result.lora_params, data, batch_size=5)
    assert found == {"accuracy": pytest.approx(right)}


# The meshes; a row of tokens is not divided.
@pytest.mark.slow
@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "fsdp")])
def test_a_mesh_gives_the_losses_of_one_device(axes, directory):
    mesh = models.make_mesh(devices=jax.devices()[: 2 ** len(axes)], **dict.fromkeys(axes, 2))
    found = []
    for place in (None, mesh):
        model = models.load(directory, mesh=place)
        (config, params), data = adapted(model), image_examples(arrays(model.config), model)
        run = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, progress=False)
        result = fit(model, params, data, data, run, lora_config=config)
        found.append([line.get("loss", line.get("eval_loss")) for line in result.history])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.slow
def test_the_command_line_trains_resumes_and_classifies(directory, pictures, tmp_path, capsys):
    rows = [
        {"file": str(path.relative_to(pictures)), "label": path.relative_to(pictures).parts[0]}
        for path in sorted(pictures.rglob("*.png"))
    ]
    (pictures / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = {}
    for name, data in {
        "folder": (str(pictures),),
        "file": (str(pictures / "rows.jsonl"), "--fields", "image=file", "--labels", "left",
                 "right"),
    }.items():  # fmt: skip
        out = tmp_path / name
        args = ["train", "--model", str(directory), "--train-data", *data, "--eval-data", data[0]]
        args += ["--output-dir", str(out), "--batch-size", "4", "--learning-rate", "1e-2"]
        args += ["--save-every", "20", "--no-progress", "--steps", "40"]
        assert main(args) == 0
        said = capsys.readouterr().out
        assert f"accuracy 1.000 on the 8 images of {data[0]}" in said
        assert ("a fresh head for the folders of" in said) == (name == "folder")
        runs[name] = train.read_metrics(out / "metrics.jsonl")
    assert [x["loss"] for x in runs["folder"] if "loss" in x] == [
        x["loss"] for x in runs["file"] if "loss" in x
    ]
    adapter = tmp_path / "folder" / "adapter"
    assert json.loads((adapter / "training_form.json").read_text()) == {
        "form": "image", "labels": ["left", "right"],
    }  # fmt: skip
    assert main(["merge", str(directory), str(adapter), str(tmp_path / "merged")]) == 0
    assert models.load(tmp_path / "merged").processor == models.load(directory).processor
    capsys.readouterr()
    prompt = str(pictures / "right" / "0.png")
    assert main(["generate", str(tmp_path / "merged"), prompt]) == 0
    merged = capsys.readouterr().out
    assert main(["generate", str(directory), "--adapter", str(adapter), prompt]) == 0
    assert capsys.readouterr().out == merged and merged.startswith("right ")


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_the_same(directory, tmp_path):
    model = models.load(directory)
    (config, params), data = adapted(model), image_examples(arrays(model.config, 6), model)

    def stop(record):
        if record.get("step") == 3:
            raise KeyboardInterrupt

    found = []
    for name, hooks in (("whole", None), ("cut", train.Hooks(record=stop))):
        settings = TrainConfig(
            steps=5, batch_size=2, save_every=2, progress=False, tensorboard=False,
            output_dir=tmp_path / name,
        )  # fmt: skip
        if hooks is not None:
            with pytest.raises(KeyboardInterrupt):
                fit(model, params, data, None, settings, lora_config=config, hooks=hooks)
            settings = dataclasses.replace(settings, resume=True)
        found.append(fit(model, params, data, None, settings, lora_config=config).lora_params)
    jax.tree.map(np.testing.assert_array_equal, *found)
    other = [x._replace(image=x.image._replace(values=x.image.values + 1)) for x in data]
    with pytest.raises(ValueError, match="was trained on other data"):
        fit(model, params, other, None, settings, lora_config=config)


def test_the_files_of_a_folder(pictures, tmp_path):
    records = load_folder(pictures)
    assert [r.label for r in records] == ["left"] * 4 + ["right"] * 4
    assert {r.form for r in records} == {"image"} and len({r.source for r in records}) == 8
    (tmp_path / "train" / "cat").mkdir(parents=True)
    made("RGB").save(tmp_path / "train" / "cat" / "a.PNG")
    with pytest.raises(ValueError, match='folders "train" are no classes: give one of them'):
        load_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "cat" / ".DS_Store").touch()
    with pytest.warns(UserWarning, match=r"notes.txt: no image, left out"):
        assert len(load_folder(tmp_path / "train")) == 1
    with pytest.raises(FileNotFoundError, match="a directory; expected a file of JSON lines, or"):
        load_folder(tmp_path / "train" / "cat")


def test_what_is_refused(base, directory, tmp_path, pictures):
    bare, model = models.load(base.directory), models.load(directory)

    def read(image, label=0, into=model):
        return image_examples([record_of({"image": image, "label": label})], into)

    with pytest.raises(ValueError, match=f"example: the model came without {FILE}, which says"):
        read("a.png", into=bare)
    with pytest.raises(FileNotFoundError, match="a.png: no such image"):
        read("a.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="example: .*a.png: not an image that can be read"):
        read(tmp_path / "a.png")
    with pytest.raises(ValueError, match="I;16 pixels have more than 8 bits"):
        read(Image.fromarray(np.zeros((8, 8), np.uint16)))
    with pytest.raises(ValueError, match="an image must be a path, Pillow's or an array, got `lis"):
        read([1])
    with pytest.raises(ValueError, match=r"has shape \(3, 8, 9\), but the model reads \(3, 8, 8\)"):
        read(np.zeros((3, 8, 9), np.float32))
    with pytest.raises(ValueError, match='field "label" must be one of "LABEL_0", .*, got 3'):
        read(made("RGB"), 3)
    with pytest.raises(ValueError, match='`vit` reads images, got "text": give "image", a path'):
        image_examples([record_of({"text": "a", "label": 0})], model)
    (tmp_path / "rows.jsonl").write_text('{"image": 3, "label": 0}')
    with pytest.raises(ValueError, match='field "image" must be text, got a number'):
        load_jsonl(tmp_path / "rows.jsonl")
    record = record_of({"image": made("RGB")})
    with pytest.raises(ValueError, match='form "image" is for a model with such a head'):
        train.examples([record], tiny_tokenizer(), max_length=8)
    features = models.init(jax.random.key(0), models.ViTConfig(task="features"))
    with pytest.raises(ValueError, match="is a `vit` without a head, which has no loss: name `lab"):
        check_causal(features)
    config, params = adapted(model)
    (one,) = read(made("RGB"))
    for other, text in (
        (one._replace(image=None), r"has text, and the model reads images of shape \(3, 8, 8\)"),
        (one._replace(targets=None), "whose head is for single_label_classification"),
    ):
        with pytest.raises(ValueError, match=text):
            fit(model, params, [other], None, RUN, lora_config=config)


PROCESSORS_REFUSED = {
    "padded": ({"do_pad": True}, "field `do_pad` = True is not supported: .* take the file out"),
    "cropped": ({"do_center_crop": True}, "`do_center_crop` is true, and `crop_size` is missing"),
    "another class": ({"image_processor_type": "CLIPImageProcessor"}, "is of CLIP, which reads im"),
    "edge": ({"size": {"shortest_edge": 8}}, "`size` must be a number, or height and width"),
    "filter": ({"resample": "bilinear"}, "`resample` must be a number from 0 to 5"),
    "deviation": ({"image_std": [1, 0, 1]}, "no deviation 0"),
}


@pytest.mark.parametrize("case", PROCESSORS_REFUSED)
def test_processors_that_are_refused(case, directory, tmp_path):
    fields, text = PROCESSORS_REFUSED[case]
    model = models.load(directory)
    save_model(tmp_path / "model", model, model.params)
    (tmp_path / "model" / FILE).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"{FILE}: .*{text}"):
        models.load(tmp_path / "model")
