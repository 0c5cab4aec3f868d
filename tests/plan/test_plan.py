"""Plans: what a config adapts, what each error says, what the table shows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora


def fn(p, tokens):
    x = p["model"]["embed"]["embedding"][tokens]

    def layer(x, p):
        h = x * p["norm"]["scale"]
        q, v = h @ p["attn"]["q_proj"]["kernel"], h @ p["attn"]["v_proj"]["kernel"]
        return x + jnp.tanh(q * v) @ p["attn"]["o_proj"]["kernel"].T, None

    x, _ = jax.lax.scan(layer, x, p["model"]["layers"])
    return x @ p["lm_head"]["kernel"]


def shaped(*shape: int, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "model": {
        "embed": {"embedding": shaped(20, 8)},
        "layers": {
            "norm": {"scale": shaped(3, 8)},
            "attn": {
                "q_proj": {"kernel": shaped(3, 8, 6)},
                "v_proj": {"kernel": shaped(3, 8, 6)},
                "o_proj": {"kernel": shaped(3, 8, 6)},
            },
        },
    },
    "lm_head": {"kernel": shaped(8, 20)},
    "step": shaped(dtype="int32"),
}
TOKENS = shaped(2, 5, dtype="int32")
ATTENTION = [f"model.layers.attn.{n}.kernel" for n in ("o_proj", "q_proj", "v_proj")]


def planned(**fields) -> lora.Plan:
    options: dict[str, Any] = {"rank": 2} | fields
    return lora.plan(lora.LoraConfig(**options), fn, PARAMS, TOKENS)


def adapted(**fields) -> list[str]:
    return [leaf.path for leaf in planned(**fields).adapted]


def test_all_linear_leaves_out_embedding_head_and_norms():
    plan = planned(target_modules="all-linear")
    assert [leaf.path for leaf in plan.adapted] == ATTENTION
    why = {leaf.path: leaf.reason for leaf in plan.leaves if leaf.kind == "frozen"}
    assert why == {
        "lm_head.kernel": 'the output head: "all-linear" leaves it out',
        "model.embed.embedding": 'an embedding: "all-linear" leaves it out',
        "model.layers.norm.scale": "no contraction and no lookup uses it, only `mul`",
        "step": "not a floating-point array with a dimension",
    }


def test_all_linear_warns_of_a_matrix_smaller_than_the_rank():
    params = {"up": shaped(8, 16), "down": shaped(16, 3)}

    def plan(**fields):
        fn, x = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], shaped(2, 8)
        return lora.plan(lora.LoraConfig(**fields), fn, params, x, strict=fields["rank"] == 5)

    left = r"`rank` 4 is above the smallest dimension 3 of `down` \(in 16, out 3\).*lower `rank`"
    with pytest.warns(lora.LeftOutWarning, match=left):
        assert "1 named matrix left out" in str(plan(rank=4))
    # The remedy is followed.
    assert len(plan(rank=4, rank_pattern={"down": 3}).adapted) == 2
    with pytest.raises(ValueError, match="`rank` 5 is above .*`strict=True` forbids that"):
        plan(rank=5)
    with pytest.raises(
        ValueError, match="target_modules='all-linear' adapts nothing: `down`: .rank"
    ):
        plan(rank=100000)


def test_a_rank_that_a_pattern_gives_is_not_lowered_for_all_linear():
    fn, x = lambda p, x: x @ p["down"] + x @ p["up"], shaped(2, 8)
    config = lora.LoraConfig(rank=2, target_modules="all-linear", rank_pattern={"down": 4})
    with pytest.raises(ValueError, match="`rank` 4 is above the smallest dimension 3 of `down`"):
        lora.plan(config, fn, {"down": shaped(8, 3), "up": shaped(8, 3)}, x)


def test_ten_matrices_left_out_are_named():
    params = {f"w{i}": shaped(8, 3) for i in range(12)} | {"up": shaped(8, 8)}

    def fn(p, x):
        return sum((x @ p[f"w{i}"] for i in range(12)), 0.0), x @ p["up"]

    with pytest.warns(lora.LeftOutWarning, match="`w7`.*; and 2 more"):
        lora.plan(lora.LoraConfig(rank=4), fn, params, shaped(2, 8))


def test_integers_neither_train_nor_get_advice_that_fails():
    def fn(p, x):
        return x @ p["attn"]["w"] + x @ p["v"] + p["attn"]["ids"].astype(jnp.float32)[:, 0]

    params = {"attn": {"w": shaped(8, 4), "ids": shaped(4, 2, dtype="int32")}, "v": shaped(8, 4)}

    def plan(**fields):
        return lora.plan(lora.LoraConfig(rank=2, **fields), fn, params, shaped(2, 8))

    saved = plan(target_modules=("v",), modules_to_save=("attn",)).by_path()
    assert (saved["attn.w"].kind, saved["attn.ids"].kind) == ("saved", "frozen")
    with pytest.raises(
        ValueError, match=r"adapts nothing \(`attn.ids`: not a floating-.*dimension"
    ):
        plan(target_modules=("ids",))
    with pytest.raises(ValueError, match="entry .ids. trains nothing: `attn.ids` is int32"):
        plan(target_modules=("w",), modules_to_save=("ids",))


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        (("q_proj",), ATTENTION[1:2]),
        (("attn.q_proj", "o_proj"), ATTENTION[:2]),
        (("model.layers.attn.v_proj",), ATTENTION[2:]),
        (r".*\.(q|v)_proj", ATTENTION[1:]),
        (r"model\.layers\.\d+\.attn\.o_proj", ATTENTION[:1]),
        (("embed", "lm_head"), ["lm_head.kernel", "model.embed.embedding"]),
    ],
)
def test_targets(targets, want):
    assert adapted(target_modules=targets) == want


def test_excluded_modules_are_left_out():
    assert adapted(target_modules="all-linear", exclude_modules=("o_proj",)) == ATTENTION[1:]


def test_roles_ranks_and_alphas_of_stacked_layers():
    plan = planned(target_modules=("q_proj", "o_proj"), alpha=8, use_rslora=True,
                   layers_to_transform=(0, 2), rank_pattern={"o_proj": 4},
                   alpha_pattern={r"layers\.2\.attn\.q_proj": 2})  # fmt: skip
    q, o = (plan.by_path()[ATTENTION[i]] for i in (1, 0))
    assert (q.roles, o.roles) == ("sio", "soi")
    assert (q.ranks, o.ranks) == ((2, 0, 2), (4, 0, 4))
    assert q.alphas == (8.0, 0.0, 2.0)
    assert q.scales == pytest.approx((8 / 2**0.5, 0.0, 2 / 2**0.5))
    assert q.parameters == 2 * 2 * (8 + 6) and q.rank == 2
    assert plan.trainable == q.parameters + o.parameters


def test_roles_of_a_table_and_of_a_head():
    plan = planned(target_modules=("embed", "lm_head")).by_path()
    assert plan["model.embed.embedding"].roles == "io" and plan["model.embed.embedding"].lookup
    assert plan["lm_head.kernel"].roles == "io"


def test_uses_name_primitive_and_line():
    use = planned(target_modules=("q_proj",)).by_path()[ATTENTION[1]].uses[0]
    assert use.primitive == "dot_general" and use.contracted == {1} and use.stacked == {0}
    assert use.line.startswith("test_plan.py:") and use.line.endswith("layer)")


def test_table_has_a_row_a_leaf_and_a_total():
    plan = planned(target_modules=("q_proj", "v_proj"), alpha=4)
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.leaves) + 3
    [row] = [line for line in lines if line.startswith(ATTENTION[1])]
    assert row.split()[1:8] == ["3x8x6", "float32", "lora", "sio", "2", "4", "84"]
    assert "dot_general test_plan.py:" in row
    assert lines[-1] == "2 of 7 leaves adapted, 0 trained whole; 168 trainable parameters"


def test_a_repr_is_short():
    plan = planned(target_modules=("q_proj", "v_proj"), alpha=4)
    assert repr(plan) == (
        "<Plan: 2 of 7 leaves adapted, 0 trained whole; 168 trainable parameters; print(plan) "
        "shows every leaf>"
    )
    leaf = plan.by_path()["step"]
    assert repr(leaf) == (
        "LeafPlan(path='step', shape=(), dtype='int32', kind='frozen', "
        "reason='not a floating-point array with a dimension')"
    )


def test_a_plan_and_a_config_are_static_arguments_of_jit():
    params = {"w": jnp.ones((8, 6))}
    config = lora.LoraConfig(rank=2, target_modules=("w",), rank_pattern={"w": 3})

    def one(p, x):
        return x @ p["w"]

    @jax.jit
    def start(config: lora.LoraConfig, plan: lora.Plan, params):
        return config.alpha * lora.init(jax.random.key(0), plan, params)["w"].a

    plans = [lora.plan(config, one, params, shaped(1, 8)) for _ in range(2)]
    want = 16 * lora.init(jax.random.key(0), plans[0], params)["w"].a
    for plan in plans:  # equal plans are one program
        # One program fuses what two round apart.
        np.testing.assert_allclose(start(config, plan, params), want, rtol=1e-6)
    assert start._cache_size() == 1
    other = lora.plan(lora.LoraConfig(rank=2), one, params, shaped(1, 8))
    assert start(config, other, params).shape == (8, 2) and start._cache_size() == 2


def test_given_roles_override():
    plan = planned(target_modules=("q_proj",), roles={"q_proj": "ioo"}, rank_pattern={"q_proj": 3})
    leaf = plan.by_path()[ATTENTION[1]]
    assert (leaf.roles, leaf.reason) == ("ioo", "roles from config")
    assert leaf.fallbacks, "scanned over an in dim: the weight is added up, and the plan says so"
    assert leaf.fallbacks[0].fallback == "it is scanned over a dim of role `i`"


def test_saved_modules_are_trained_whole():
    plan = planned(target_modules=("q_proj",), modules_to_save=("lm_head",))
    assert [leaf.path for leaf in plan.saved] == ["lm_head.kernel"]
    assert plan.trainable == 84 + 160


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": ("q_prj",)}, r"target_modules` entry .q_prj. matches no module; neare.*"
         r"`model.layers.attn.q_proj`"),
        ({"target_modules": ("q_proj", "w1")}, "target_modules` entry .w1. matches no module"),
        ({"target_modules": "nothing.*"}, r"target_modules` entry .nothing.\*. matches no module"),
        ({"target_modules": ("norm",)}, r"target_modules` entry .norm. adapts nothing "
         r"\(`model.layers.norm.scale`: no contraction and no lookup uses it, only `mul`\)"),
        ({"target_modules": ("q_proj",), "rank": 7}, r"`rank` 7 is above the smallest dimension 6 "
         r"of `model.layers.attn.q_proj.kernel` \(in 8, out 6\)"),
        ({"target_modules": ("q_proj",), "modules_to_save": ("score",)},
         "modules_to_save` entry .score. matches no module"),
        ({"target_modules": ("q_proj",), "layers_to_transform": (7, 9)},
         r"^`layers_to_transform` is \(7, 9\), and layers are numbered 0 to 2$"),
        ({"exclude_modules": ".*"}, "^`exclude_modules` leaves out every module"),
        ({"exclude_modules": ("q_proj", "v_proj", "o_proj", "lm_head", "embed")},
         "^`exclude_modules` leaves out every module"),
        ({"target_modules": ("q_proj",), "roles": {"q_proj": "io"}},
         r"roles\['q_proj'\]='io' does not fit `model.layers.attn.q_proj.kernel` with 3 dims"),
    ],
)  # fmt: skip
def test_mistakes_are_errors_that_help(fields, text: str):
    with pytest.raises(ValueError, match=text):
        planned(**fields)


def test_a_module_listed_by_its_whole_name_is_adapted_in_any_layer():
    """As in PEFT, which filters matches of a name's end by their layer."""
    plan = planned(target_modules=("model.layers.2.attn.q_proj",), layers_to_transform=(1,))
    assert [leaf.path for leaf in plan.adapted] == ["model.layers.attn.q_proj.kernel"]


def test_roles_of_a_module_are_its_matrix_s():
    params = {"up": {"kernel": shaped(4, 8), "bias": shaped(8)}}
    config = lora.LoraConfig(rank=2, roles={"up": "io"})
    plan = lora.plan(
        config, lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"], params, shaped(2, 4)
    )
    assert [leaf.path for leaf in plan.adapted] == ["up.kernel"]
    with pytest.raises(ValueError, match=r"'up.bias'\]='io' does not fit `up.bias` with 1 dims"):
        lora.plan(
            dataclasses.replace(config, roles={"up.bias": "io"}),
            lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"], params, shaped(2, 4),
        )  # fmt: skip


def test_what_the_config_excludes_says_so():
    plan = planned(exclude_modules=("q_proj",))
    why = {leaf.path: leaf.reason for leaf in plan.leaves}
    assert why["model.layers.attn.q_proj.kernel"] == "in `exclude_modules`"


def test_an_adapted_tree_cannot_be_planned_again():
    params = {"w": jnp.ones((8, 6))}
    config = lora.LoraConfig(rank=2, target_modules=("w",))

    def one(p, x):
        return x @ p["w"]

    plan = lora.plan(config, one, params, jnp.ones((1, 8)))
    tree = lora.init(jax.random.key(0), plan, params)
    with pytest.raises(ValueError, match="`params` already has an adapter at `w`"):
        lora.plan(config, one, tree, jnp.ones((1, 8)))


def test_experts_are_said_and_can_be_overridden():
    def moe(p, x):
        h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["up"]))
        return jnp.einsum("btef,efd->btd", h, p["down"])

    params = {"up": shaped(3, 8, 6), "down": shaped(3, 6, 8)}
    config = lora.LoraConfig(rank=2)
    leaf = lora.plan(config, moe, params, shaped(2, 5, 8)).by_path()["up"]
    assert leaf.roles == "sio" and leaf.ranks == (2, 2, 2)
    assert "looks like experts" in leaf.reason and "`roles` overrides" in leaf.reason
    assert leaf.reason in str(lora.plan(config, moe, params, shaped(2, 5, 8)))
    config = lora.LoraConfig(rank=2, roles={"up": "oio", "down": "iio"})
    assert lora.plan(config, moe, params, shaped(2, 5, 8)).by_path()["up"].roles == "oio"


def test_python_branches_on_concrete_parameters_are_allowed():
    """An integer parameter that decides a branch stays concrete while planning."""
    params = {"w": jnp.ones((8, 6)), "twice": 2}

    def branching(p, x, flag):
        y = x @ p["w"]
        return y @ p["w"].T if flag and p["twice"] == 2 else y

    config = lora.LoraConfig(rank=2, target_modules=("w",))
    plan = lora.plan(config, branching, params, shaped(1, 8), True)
    assert len(plan.by_path()["w"].uses) == 2


def test_rows_by_constant_indices_that_meet_weights_alone_are_a_tables():
    """A table of distances between tokens, which the projection of keys maps."""
    rows = np.array([3, 0, 1, 1])

    def scores(p, x):
        return (x @ p["k"]) @ (p["table"][rows] @ p["k"]).T

    params = {"k": shaped(8, 6), "table": shaped(4, 8)}
    leaf = lora.plan(lora.LoraConfig(rank=2, target_modules="table"), scores, params, shaped(2, 8))
    assert leaf.by_path()["table"].roles == "io" and leaf.by_path()["table"].lookup

    def permuted(p, x):
        return x @ p["table"][rows]

    params = {"table": shaped(4, 8)}
    leaf = lora.plan(lora.LoraConfig(rank=2), permuted, params, shaped(2, 4)).by_path()["table"]
    assert leaf.roles == "io" and not leaf.lookup


Q = {"q": {"kernel": 0, "bias": 1}}


def _of_layers(tree, **fields):
    """The plan of a tree of square kernels, 0, and biases, 1, for layer 1."""
    params = jax.tree.map(lambda n: jnp.ones((4,) * (2 - n)), tree)

    def call(params, x):
        for w in jax.tree.leaves(params):
            x = x @ w if w.ndim == 2 else x + w
        return x

    fields = {"target_modules": ("q",), "layers_to_transform": 1} | fields
    return lora.plan(lora.LoraConfig(rank=2, **fields), call, params, jnp.ones((1, 4)))


@pytest.mark.parametrize(
    "tree, text",
    [
        (Q, "no module has a layer's number behind two.*: leave it out"),
        ({"layers": [Q] * 2}, "no module has a layer's number.*, `layers_pattern=\"layers\"`"),
        ({"layers": [{"parts": [Q] * 3}] * 2},
         "behind two names, .* is 0 in `layers.0.parts.0.q`: .*, `layers_pattern=\"layers\"`"),
        ({"layers": [[Q]] * 2}, "is 0 in `layers.0.0.q`: .*, `layers_pattern=\"layers\"`"),
        # The biases of four numbers are no stacks of four layers.
        ({"net": {"layers": {"layers": [Q]}}}, "is 1, and layers are numbered 0 to 0$"),
    ],
)  # fmt: skip
def test_layers_to_transform_that_are_not_found(tree, text):
    """PEFT counts layers behind two names: elsewhere it would filter nothing, or a list inside."""
    with pytest.raises(ValueError, match=text):
        _of_layers(tree)


@pytest.mark.parametrize(
    "tree, fields, path",
    [
        ({"layers": [Q] * 3}, {"layers_pattern": "layers"}, "layers.1.q.kernel"),
        ({"layers": [[Q]] * 3}, {"layers_pattern": "layers"}, "layers.1.0.q.kernel"),
        ({"net": {"layers": [{"parts": (Q,)}] * 3}}, {}, "net.layers.1.parts.0.q.kernel"),
        ({"net": {"h": [Q] * 3}, "stem": [{"parts": [{"b": 0}]}]}, {}, "net.h.1.q.kernel"),
    ],
)  # fmt: skip
def test_layers_to_transform_of_nested_lists(tree, fields, path):
    assert [leaf.path for leaf in _of_layers(tree, **fields).adapted] == [path]


def test_a_head_whose_columns_are_looked_up_too_is_no_table():
    """The logits of a loss, some at a time, less the label's."""

    def loss(p, x, labels):
        logits = jnp.stack([x @ p["head"][:, i : i + 4] for i in (0, 4)])
        return logits.sum() - jnp.einsum("bd,db->b", x, p["head"][:, labels]).sum()

    def items(p, x, ids):
        return jnp.einsum("bd,bd->b", x, p["items"][ids])

    ids = shaped(3, dtype="int32")
    head = lora.plan(lora.LoraConfig(rank=2, target_modules=("head",)), loss,
                     {"head": shaped(6, 8)}, shaped(3, 6), ids)  # fmt: skip
    table = lora.plan(lora.LoraConfig(rank=2, target_modules=("items",)), items,
                      {"items": shaped(9, 6)}, shaped(3, 6), ids)  # fmt: skip
    assert [leaf.lookup for leaf in (*head.adapted, *table.adapted)] == [False, True]
