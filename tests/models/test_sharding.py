"""The sharding rules of base models: the mesh axis of each dim, and how a user changes them."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.models.saving import save_model
from lora_jax.models.sharding import RULES
from lora_jax.sharding import LeafDims, Rules, specs

MESH = {"data": 1, "fsdp": 4, "tensor": 2}
CONFIG = lora.models.LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, "float32")


def kernel(name: str, *sizes: int) -> dict:
    return {name: {"kernel": shape(*sizes)}}


def by_path(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {lora.paths.spell(path): spec for path, spec in leaves}


def test_a_decoder_has_fsdp_on_its_width_and_tensor_on_heads_mlp_and_vocabulary():
    forward = lora.models.registry.architecture_of("llama").forward(config=CONFIG, scan=True)
    found = by_path(specs(forward.shapes(), RULES, MESH))
    ends = {path.removeprefix("model.layers."): spec for path, spec in found.items()}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert ends[f"self_attn.{name}.kernel"] == P(None, "fsdp", "tensor")
    assert ends["self_attn.o_proj.kernel"] == P(None, ("tensor", "fsdp"), None)
    assert ends["mlp.gate_proj.kernel"] == ends["mlp.up_proj.kernel"] == P(None, "fsdp", "tensor")
    assert ends["mlp.down_proj.kernel"] == P(None, ("tensor", "fsdp"), None)
    assert ends["lm_head.kernel"] == P("fsdp", "tensor")
    assert ends["model.embed_tokens.embedding"] == P("tensor", "fsdp")
    assert ends["input_layernorm.scale"] == P()


OTHERS = {
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "bert": "attention.self.query attention.self.key attention.self.value attention.output.dense"
    " intermediate.dense output.dense",
    "distilbert": "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1"
    " ffn.lin2",
    "modernbert": "attn.Wqkv attn.Wo mlp.Wi mlp.Wo",
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_models_have_tensor_on_heads_and_mlp(model_type):
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size"
    names = "n_embd n_layer n_head n_inner" if model_type == "gpt2" else names
    raw = dict(zip(names.split(), (32, 1, 4, 64), strict=True), model_type=model_type)
    config = lora.models.config_from_hf(raw)
    forward = lora.models.registry.architecture_of(model_type).forward(config=config, scan=True)
    found = by_path(specs(forward.shapes(), RULES, {"tensor": 2}))
    spread = {path for path, spec in found.items() if "tensor" in spec and "kernel" in path}
    for name in OTHERS[model_type].split():
        spread.remove(next(path for path in spread if path.endswith(f".{name}.kernel")))
    assert not spread


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({}, P(None, None)),
        ({"data": 8}, P(None, None)),
        ({"fsdp": 4}, P("fsdp", None)),
        ({"tensor": 2}, P("tensor", None)),
        ({"fsdp": 4, "tensor": 2}, P(("tensor", "fsdp"), None)),
        ({"fsdp": 5, "tensor": 2}, P("tensor", "fsdp")),
        ({"fsdp": 5}, P(None, "fsdp")),  # divides the outputs only
    ],
)
def test_an_axis_takes_the_first_dim_that_it_divides(mesh, expected):
    assert specs(kernel("o_proj", 64, 320), RULES, mesh)["o_proj"]["kernel"] == expected


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"fsdp": 4}, P(None, "fsdp", None, None)),
        ({"expert": 2, "fsdp": 4}, P(None, ("expert", "fsdp"), None, None)),
        ({"fsdp": 4, "tensor": 2}, P(None, "fsdp", None, "tensor")),
        ({"fsdp": 16}, P(None, None, "fsdp", None)),  # divides the inputs only
    ],
)
@pytest.mark.parametrize("form", [None, "nf4"])
def test_experts_are_cut_between_experts_first(mesh, expected, form):
    """To gather their inputs XLA copies the shards of all layers, turned round."""
    params = {"experts": {"gate_up_proj": jax.numpy.ones((2, 8, 2048, 64))}}
    if form:
        params = lora.quantize(params, ["gate_up_proj"], format=form, roles={".*": "ssio"})
    assert specs(params, RULES, mesh)["experts"]["gate_up_proj"] == expected


def test_biases_follow_tensor_and_are_never_gathered():
    tree = {"q_proj": {"bias": shape(64)}, "o_proj": {"bias": shape(64)}}
    found = specs(tree, RULES, MESH)
    assert found == {"q_proj": {"bias": P("tensor")}, "o_proj": {"bias": P()}}


def test_a_quantized_matrix_keeps_its_superblocks_whole():
    params = {"q_proj": {"kernel": jax.numpy.ones((256, 512))}}
    q = lora.quantize(params, ["kernel"], format="nf4")
    assert specs(q, RULES, {"fsdp": 2})["q_proj"]["kernel"] == P("fsdp", None)
    # Four parts of 256 inputs would be half a superblock each.
    assert specs(q, RULES, {"fsdp": 4})["q_proj"]["kernel"] == P(None, "fsdp")
    q = {"down_proj": q["q_proj"]}
    assert specs(q, RULES, {"tensor": 2})["down_proj"]["kernel"] == P("tensor", None)
    assert specs(q, RULES, {"tensor": 4})["down_proj"]["kernel"] == P(None, "tensor")
    both = specs(q, RULES, {"fsdp": 2, "tensor": 4})
    assert both["down_proj"]["kernel"] == P("fsdp", "tensor")


def test_rules_are_changed_by_a_dim_or_by_a_pattern_on_paths():
    tree = kernel("lm_head", 64, 512) | kernel("experts", 64, 512)
    whole = dataclasses.replace(RULES, axes={**RULES.axes, "vocabulary": ()})
    assert specs(tree, whole, MESH)["lm_head"]["kernel"] == P("fsdp", None)
    row = LeafDims(r"experts\.kernel$", ("hidden", "mlp"))
    own = dataclasses.replace(RULES, leaves=(row, *RULES.leaves))
    assert specs(tree, RULES, MESH)["experts"]["kernel"] == P("fsdp", None)
    assert specs(tree, own, MESH)["experts"]["kernel"] == P("fsdp", "tensor")


@pytest.mark.parametrize(("axis", "sizes"), [("fsdp", (6, 10)), ("tensor", (8, 9))])
def test_an_axis_that_divides_nothing_is_an_error_with_path_and_shape(axis, sizes):
    with pytest.raises(ValueError) as error:
        specs(kernel("q_proj", *sizes), RULES, {axis: 4})
    assert f'`mesh` axis "{axis}" = 4 divides no dim of `q_proj.kernel` {sizes}' in str(error.value)


def test_place_leaves_whole_what_an_axis_does_not_divide_and_warns():
    mesh = lora.models.make_mesh(fsdp=8)
    tree = {
        "q_proj": {"kernel": jax.numpy.ones((12, 20))},
        "o_proj": {"kernel": jax.numpy.ones((16, 8))},
    }
    with pytest.warns(UserWarning, match=r"all of `q_proj.kernel` \(12, 20\) along \"fsdp\""):
        placed = lora.sharding.place(tree, mesh, RULES)
    assert placed["q_proj"]["kernel"].sharding.is_fully_replicated
    assert placed["o_proj"]["kernel"].addressable_shards[0].data.shape == (2, 8)


def test_place_puts_adapters_where_their_weights_are():
    w = jax.numpy.ones((64, 32))
    leaf = lora.LoraArray(w, jax.numpy.ones((64, 4)), jax.numpy.ones((4, 32)), jax.numpy.ones(()))
    placed = lora.sharding.place(
        {"q_proj": {"kernel": leaf}}, lora.models.make_mesh(fsdp=4, tensor=2), RULES
    )
    found = placed["q_proj"]["kernel"]
    assert found.w.sharding.spec == P("fsdp", "tensor")
    assert found.a.sharding.spec == P("fsdp", None) and found.b.sharding.spec == P(None, "tensor")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (dict(fsdp=3), "`mesh` is fsdp=3, but the number of devices is 8"),
        (dict(data=-1, fsdp=-1), "one of them may be -1"),
        (dict(data=3, fsdp=-1), "multiply up to it"),
        (dict(model=8), "`mesh` has no axis 'model'; expected data, fsdp, tensor"),
        (
            dict(fsdp=0),
            "`mesh` axis .fsdp. must be a whole number above 0, or -1 for the rest, got 0",
        ),
        ({}, "`mesh` is empty"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        lora.models.make_mesh(**axes)


@pytest.mark.parametrize("none", [8, "cpu", [], [0, 1]])
def test_what_is_no_device_is_refused(none):
    with pytest.raises(TypeError, match=r"`devices` must be devices, such as .*`fsdp=-1`"):
        lora.models.make_mesh(devices=none)


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (LeafDims, ("(", ("a", "b")), "`pattern` of `LeafDims` must be a regular expression"),
        (LeafDims, ("w$", "hidden"), "`dims` of `LeafDims` must be a tuple of names"),
        (LeafDims, ("w$", ("a", "b"), (0, 2)), "`order` of `LeafDims` must have positions"),
        (LeafDims, ("w$", ("a",)), "0 to 0, got .0, 1."),
        (Rules, ({"a": "fsdp"}, ()), r'`axes\["a"\]` of `Rules` must be a tuple of names'),
        (Rules, ((), ()), "`axes` of `Rules` must map a logical dim to mesh axes"),
        (Rules, ({}, ("w$",)), "`leaves` of `Rules` must be `LeafDims`, got `str` 'w.'"),
    ],
)
def test_rules_that_name_no_dims_are_refused(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(*given)


def test_minus_one_is_what_the_other_axes_leave():
    assert dict(lora.models.make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a small decoder, and its parameters."""
    place = tmp_path_factory.mktemp("saved") / "model"
    model = lora.models.init(jax.random.key(0), CONFIG, dtype="bfloat16")
    save_model(place, model, model.params)
    return place, model.params


def test_a_model_on_a_mesh_generates_the_same_tokens(saved):
    want = lora.models.load(saved[0])
    found = lora.models.load(saved[0], mesh=lora.models.make_mesh(fsdp=4, tensor=2))
    prompts = [[1, 2, 3], [4, 5]]
    tokens = [lora.models.generate(m, m.params, prompts, max_new_tokens=4) for m in (found, want)]
    assert tokens[0] == tokens[1]


def test_rules_without_a_mesh_are_refused(tmp_path):
    own = Rules({"hidden": ("fsdp",)}, ())
    calls = (lora.models.load, lora.models.load_encoder, lora.checkpoint.restore_params)
    for call, more in zip(calls, ((), (), ({},)), strict=True):
        with pytest.raises(ValueError, match="`rules` spread weights over a mesh, and `mesh` is N"):
            call(tmp_path, *more, rules=own)


AUTOMATIC = (jax.sharding.AxisType.Auto,)


def misspelt():
    """A mesh whose axis the rules do not name, and rules whose axis the mesh does not have."""
    own = dataclasses.replace(RULES, axes={"other": ("fdsp",)})
    return [
        (
            jax.make_mesh((8,), ("model",), axis_types=AUTOMATIC),
            RULES,
            '"model"',
            '"expert", "context", "tensor", "fsdp"',
        ),
        (lora.models.make_mesh(fsdp=8), own, '"fsdp"', '"fdsp"'),
        (lora.models.make_mesh(fsdp=8), dataclasses.replace(RULES, axes={}), '"fsdp"', "no axis"),
    ]


@pytest.mark.parametrize("case", range(3))
def test_an_axis_that_no_rule_names_is_a_warning(case):
    mesh, rules, axis, known = misspelt()[case]
    tree = {"q_proj": {"kernel": jax.numpy.ones((16, 8))}}
    text = f"all weights along {axis} of the mesh .*: the rules name {known}; take a mesh of"
    with pytest.warns(UserWarning, match=text):
        placed = lora.sharding.place(tree, mesh, rules)
    assert placed["q_proj"]["kernel"].sharding.is_fully_replicated


def test_axes_of_the_rows_are_named_without_a_warning():
    tree = {"q_proj": {"kernel": jax.numpy.ones((16, 8))}}
    lora.sharding.place(tree, lora.models.make_mesh(data=8), RULES)
    mesh = jax.make_mesh((4, 2), ("batch", "wide"), axis_types=AUTOMATIC * 2)
    rules = lora.sharding.Rules(
        {"rows": ("batch",), "width": ("wide",)}, (LeafDims(r"kernel$", ("width", "other")),)
    )
    placed = lora.sharding.place(tree, mesh, rules)
    assert placed["q_proj"]["kernel"].sharding.spec == P("wide", None)


def test_a_matrix_that_no_row_names_is_a_warning_and_an_empty_row_copies_it():
    mesh = lora.models.make_mesh(fsdp=8)
    tree = {"dense": {"w": jax.numpy.ones((16, 8)), "b": jax.numpy.ones(8)}}
    with pytest.warns(
        UserWarning, match=r"all of `dense.w` \(16, 8\): none of the rules' `leaves`"
    ):
        lora.sharding.place(tree, mesh, RULES)
    copied = dataclasses.replace(RULES, leaves=(LeafDims(r"w$", ()), *RULES.leaves))
    placed = lora.sharding.place(tree, mesh, copied)
    assert placed["dense"]["w"].sharding.is_fully_replicated


def test_specs_refuse_an_axis_that_no_rule_names():
    with pytest.raises(
        ValueError, match='`mesh_shape` has the axis "fdsp", and the rules name "expert", "context'
    ):
        specs(kernel("q_proj", 16, 8), RULES, {"fdsp": 8})


@pytest.mark.parametrize("mesh", [8, "fsdp=8", {"fsdp": 8}])
def test_a_mesh_that_is_none_is_refused_before_anything_is_read(mesh, tmp_path):
    with pytest.raises(TypeError, match=r"`mesh` must be a `jax.sharding.Mesh`, got .*make_mesh"):
        lora.models.load(tmp_path / "missing", mesh=mesh)


def test_a_leafs_own_dims_come_before_those_of_layers():
    row = LeafDims(r"kernel$", ("hidden", "mlp"), (1, 0))
    rules = Rules({"layers": ("fsdp",), "hidden": ("fsdp",), "mlp": ("fsdp",)}, (row,))
    for width, expected in ((8, P(None, None, "fsdp")), (6, P(None, "fsdp", None))):
        tree = {"kernel": shape(4, 8, width)}
        assert specs(tree, rules, {"fsdp": 4})["kernel"] == expected
    assert specs({"kernel": shape(4, 6, 6)}, rules, {"fsdp": 4})["kernel"] == P("fsdp", None, None)
