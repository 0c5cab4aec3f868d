"""Tables of module names and of the fields that choose among them, for our rules and PEFT's."""

from typing import NamedTuple

Q3 = "model.layers.3.self_attn.q_proj"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"


class Case(NamedTuple):
    name: str
    targets: list | str
    expected: bool
    layers: list | int | None = None
    pattern: list | str | None = None
    exclude: list | str | None = None
    save: list | None = None


CASES = [
    # names in a list: the whole name, or its end after a dot; no regular expressions
    Case("", ["q_proj"], False),
    Case("q_proj", ["q_proj"], True),
    Case("q_proj", ["k_proj"], False),
    Case("q_proj", ["q_proj", "k_proj"], True),
    Case(Q3, ["q_proj"], True),
    Case(Q3, ["q_proj", "v_proj"], True),
    Case(Q3, ["self_attn.q_proj"], True),
    Case(Q3, [Q3], True),
    Case(Q3, ["proj"], False),
    Case(Q3, ["attn.q_proj"], False),
    Case(Q3, ["self_attn"], False),
    Case(Q3, [".*q_proj"], False),
    Case(Q3, ["Q_PROJ"], False),
    Case(Q3 + ".inner", ["q_proj"], False),
    Case("model.layers.3.self_attn.rotary", ["q_proj", "v_proj"], False),
    Case("a.b.q_proj", ["q_proj"], True),
    # an empty list means nothing
    Case("", [], False),
    Case("q_proj", [], False),
    Case(Q3, [], False, pattern=[]),
    # a string: a regular expression for the whole name
    Case("q_proj", "q_proj", True),
    Case(Q3, "q_proj", False),
    Case("q_proj", ".*oj", True),
    Case("q_proj", "q_.*", True),
    Case("q_proj", ".*down.*", False),
    Case("undertow", ".*dert.*", True),
    Case(Q3, r".*\.(q_proj|v_proj)", True),
    Case(Q3, r".*\.(k_proj|v_proj)", False),
    Case(Q3, r"model\.layers\.[0-3]\..*_proj", True),
    Case(Q3, r"layers\.3\..*", False),
    # layers_to_transform with the name of the list of layers
    Case("net.stage.1.up", ["up"], True, [1], ["stage"]),
    Case("net.stage.1.up", ["up"], False, [0], ["stage"]),
    Case("net.stage.1.up", ["up"], False, [2], ["stage"]),
    Case("net.stage.10.up", ["up"], False, [0], ["stage"]),
    Case("net.stage.10.up", ["up"], False, [1], ["stage"]),
    Case("net.stage.10.up", ["up"], True, [10], ["stage"]),
    Case("net.stage.1.up", ["up"], True, [0, 1, 2], ["stage"]),
    Case("net.stage.1.up", ["up", "down"], True, [1], ["stage"]),
    Case("net.stage.1.up", ["up", "down"], True, [0, 1, 2], ["stage"]),
    Case("net.stage.1.up", ["up"], False, [1], ["net"]),
    Case("net.stage.1.up", ["up"], False, [1], ["up"]),
    Case("net.stage.1.up", ["up"], True, [1], "stage"),
    Case("net.stage.1.up", ["up"], True, [1], ["block", "stage"]),
    Case("net.stage.007.up", ["up"], True, [7], ["stage"]),
    Case("net.stage.1.part.2.up", ["up"], True, [1], ["stage"]),
    Case("net.stage.2.part.1.up", ["up"], False, [1], ["stage"]),
    Case("net.stage.1.part.2.up", ["up"], True, [2], ["part"]),
    # the list of layers at the very start of the name (PEFT since 0.21)
    Case("stage.1.up", ["up"], True, [1], ["stage"]),
    Case("stage.1.up", ["up"], False, [0], ["stage"]),
    Case("stage.1.side", ["up"], False, [1], ["stage"]),
    Case("backstage.1.up", ["up"], False, [1], ["stage"]),
    # ... and without: the first number after two names
    Case("net.whatever.1.up", ["up"], True, [1], []),
    Case("net.whatever.1.up", ["up"], False, [0], []),
    Case("net.whatever.1.up", ["up"], True, [1], ""),
    Case("net.whatever.1.up", ["up"], False, [0], ""),
    Case("net.whatever.1.up", ["up"], True, [1]),
    Case("net.whatever.1.up", ["up"], False, [0]),
    Case("net.whatever.1.up", ["up"], True, 1),
    Case("net.whatever.1.up", ["up"], False, 0),
    Case("net.whatever.1.up", ["up"], True, []),
    Case("stage.1.up", ["up"], False, [1]),
    Case("net.up", ["up"], False, [1]),
    Case(EXPERT, ["up_proj"], True, [1]),
    Case(EXPERT, ["up_proj"], False, [0]),
    Case(EXPERT, ["up_proj"], True, [0], ["experts"]),
    Case(Q3, ["q_proj"], True, [3], ["layers"]),
    Case(Q3, ["q_proj", "v_proj"], True, [1, 2, 3], ["layers"]),
    # a module listed by its whole name is adapted in any layer
    Case(Q3, [Q3], True, [0]),
    Case(Q3, [Q3, "q_proj"], True, [0]),
    # exclusion comes before everything
    Case(Q3, ["q_proj"], False, exclude=["q_proj"]),
    Case(Q3, ["q_proj"], False, exclude=[Q3]),
    Case(Q3, [Q3], False, exclude=["self_attn.q_proj"]),
    Case(Q3, ["q_proj"], True, exclude=["proj"]),
    Case(Q3, ["q_proj"], True, exclude=["self_attn"]),
    Case(Q3, ["q_proj"], False, exclude=r".*layers\.3\..*"),
    Case(Q3, ["q_proj"], True, exclude=r"layers\.3\..*"),
    Case(Q3, r".*q_proj", False, exclude=["q_proj"]),
    # and so do the modules that are trained whole, with all that is inside
    Case("lm_head", ["lm_head"], False, save=["lm_head"]),
    Case("model.score", ["score"], False, save=["score"]),
    Case("model.score.dense", ["dense"], False, save=["score"]),
    Case("model.scores.dense", ["dense"], True, save=["score"]),
    Case("model.myscore", ["myscore"], True, save=["score"]),
    Case(Q3, ["q_proj"], False, save=["self_attn"]),
]

# name, patterns in their order, the pattern that wins
PATTERNS = [
    ("up", ["up"], "up"),
    ("net.up", ["up"], "up"),
    ("net.mlp.up", ["up"], "up"),
    ("net.mlp.up", ["mlp.up"], "mlp.up"),
    ("net.mlp.up", ["lp.up"], None),
    ("backup", ["up"], None),
    ("upper", ["up"], None),
    ("up.down", ["up"], None),
    ("net.up", ["^up"], None),
    ("up", ["^up"], "^up"),
    ("net.up", [r"^net\.up"], r"^net\.up"),
    ("net.up", [r"n.t\.up"], r"n.t\.up"),
    ("net.up", [".*up"], ".*up"),
    ("net.backup", [".*up"], ".*up"),
    ("net.up", ["up", "net.up"], "up"),
    ("net.up", ["net.up", "up"], "net.up"),
    ("net.up", ["down", "up"], "up"),
    ("net.up", ["up$"], "up$"),
    ("net.layers.10.up", [r"layers\.1\.up"], None),
    ("net.layers.10.up", [r"layers\.1.\.up"], r"layers\.1.\.up"),
    ("net.layers.1.up", ["(up|down)"], "(up|down)"),
    ("net.layers.1.up", ["up|down"], "up|down"),
    ("net.up", [], None),
]

# name, modules_to_save, trained whole?
SAVED = [
    ("lm_head", ["lm_head"], True),
    ("model.lm_head", ["lm_head"], True),
    ("lm_head", ["head"], True),
    ("lm_head.dense", ["lm_head"], True),
    ("lm_heads", ["lm_head"], False),
    ("model.embed_tokens", ["lm_head", "embed_tokens"], True),
    ("model.layers.0.mlp.up_proj", ["mlp"], True),
    ("model.layers.0.mlp.up_proj", ["layers.0.mlp"], True),
    ("model.layers.10.mlp.up_proj", ["layers.1.mlp"], False),
    ("model.layers.0.mlp.up_proj", [], False),
]
