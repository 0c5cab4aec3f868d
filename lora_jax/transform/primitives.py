"""The table of primitives: one row each, which states how the library treats the primitive.

To support another primitive, add its row; `Primitive` explains the fields. A primitive without a
row gets `UNKNOWN`: a weight that meets it is materialized.
"""

from lora_jax.transform import (
    dim_maps,
    rules,
    rules_call,
    rules_consume,
    rules_custom,
    rules_loop,
    rules_rearrange,
    rules_reduce,
    rules_write,
)
from lora_jax.transform.many import lookup, token_axis
from lora_jax.transform.many import rules as many_rules
from lora_jax.transform.primitive import (
    Body,
    DimFlow,
    ManyRule,
    Memory,
    Primitive,
    Rule,
    TokenRule,
)


def _rearranging(rule: Rule, dims: DimFlow, tokens: TokenRule, memory: Memory) -> Primitive:
    """Gives another weight: every adapter of a stack is rearranged alike."""
    return Primitive(
        rule=rule, many=many_rules.for_all, body=None, dims=dims, tokens=tokens, memory=memory
    )


def _joining(rule: Rule, dims: DimFlow, tokens: TokenRule, memory: Memory) -> Primitive:
    """Gives a weight whose base may depend on the adapter, or a vector that does."""
    many = many_rules.for_all_or_row("its sum has no form for many adapters")
    return Primitive(rule=rule, many=many, body=None, dims=dims, tokens=tokens, memory=memory)


def _control(rule: Rule, body: Body, memory: Memory, many: ManyRule | None = None) -> Primitive:
    """Runs jaxprs of its own: what is inside has rows of its own, for one adapter and for many."""
    return Primitive(
        rule=rule,
        many=many,
        body=body,
        dims=dim_maps.MIXED,
        tokens=token_axis.lost,
        memory=memory,
    )


def _activations(dims: DimFlow, tokens: TokenRule, memory: Memory) -> Primitive:
    """Has no low-rank form: a weight that meets it is materialized."""
    return Primitive(rule=None, many=None, body=None, dims=dims, tokens=tokens, memory=memory)


def _unchanged(rule: Rule, memory: Memory) -> Primitive:
    """The same weight with every number in its place, as after a copy or a cast."""
    return _rearranging(rule, dim_maps.UNCHANGED, token_axis.elementwise, memory)


def _elementwise(memory: Memory) -> Primitive:
    return _activations(dim_maps.SAME_SHAPE, token_axis.elementwise, memory)


# A primitive of another library: the dataflow follows its operands where shapes are equal.
UNKNOWN = _activations(dim_maps.SAME_SHAPE, token_axis.lost, "fused")
_REDUCTION = _activations(dim_maps.REDUCED, token_axis.reduction, "sum")
_WINDOWED = _activations(dim_maps.SAME_SHAPE, token_axis.lost, "sum")
# Random bits and custom calls: one kernel each, which the compiler fuses with nothing.
_KERNEL = _activations(dim_maps.SAME_SHAPE, token_axis.lost, "reader")
_SCATTER_ADD = _joining(
    rules.writing(rules_write.scatter_add), dim_maps.WRITTEN, token_axis.first, "adds"
)
_CUSTOM_VJP = _control(rules_custom.custom_vjp, "call", "call")

# Read by the interpreter, the dataflow, the token follower and the memory estimate, by the name
# that `compat.name_of` gives.
PRIMITIVES: dict[str, Primitive] = {
    # Products and lookups: these consume a weight.
    "dot_general": Primitive(
        rule=rules.dot_general,
        many=many_rules.dot_general,
        body=None,
        dims=dim_maps.SCALED._replace(maps=dim_maps.multiplied, contracted=dim_maps.dot_axes),
        tokens=token_axis.dot,
        memory="product",
    ),
    "ragged_dot_general": Primitive(
        rule=rules.consuming(rules_consume.ragged_dot),
        many=many_rules.one_for_row("experts have their tokens in another order"),
        body=None,
        dims=dim_maps.MIXED._replace(contracted=dim_maps.ragged_axes),
        tokens=token_axis.lost,
        memory="product",
    ),
    "conv_general_dilated": Primitive(
        rule=rules.consuming(rules_consume.conv),
        many=many_rules.one_for_row("a convolution mixes the tokens under its window"),
        body=None,
        dims=dim_maps.MIXED._replace(contracted=dim_maps.kernel_axes),
        tokens=token_axis.conv,
        memory="kernel",
    ),
    "gather": Primitive(
        rule=rules.gather,
        many=lookup.gather,
        body=None,
        dims=dim_maps.rearranged(dim_maps.gathered)._replace(
            picked=dim_maps.indexed, keeps_rows=dim_maps.is_first, takes_data=dim_maps.always
        ),
        tokens=token_axis.gather,
        memory="lookup",
    ),
    # Rearrangements: the result is a weight again.
    "transpose": _rearranging(
        rules.rearranging(rules_rearrange.transpose),
        dim_maps.rearranged(dim_maps.transposed),
        token_axis.transpose,
        "view",
    ),
    "reshape": _rearranging(
        rules.rearranging(rules_rearrange.reshape),
        dim_maps.rearranged(dim_maps.reshaped),
        token_axis.reshape,
        "view",
    ),
    "squeeze": _rearranging(
        rules.rearranging(rules_rearrange.squeeze),
        dim_maps.rearranged(dim_maps.squeezed),
        token_axis.squeeze,
        "view",
    ),
    "broadcast_in_dim": _rearranging(
        rules.rearranging(rules_rearrange.broadcast_in_dim),
        dim_maps.rearranged(dim_maps.broadcast),
        token_axis.broadcast,
        "fused",
    ),
    "slice": _rearranging(
        rules.rearranging(rules_rearrange.slice_),
        dim_maps.rearranged(dim_maps.sliced)._replace(picked=dim_maps.cut_to_one),
        token_axis.uncut,
        "fused",
    ),
    "dynamic_slice": _rearranging(
        rules.rearranging(rules_rearrange.dynamic_slice),
        dim_maps.rearranged(dim_maps.sliced)._replace(
            picked=dim_maps.cut_to_one, keeps_rows=dim_maps.is_first, takes_data=dim_maps.always
        ),
        token_axis.uncut,
        "fused",
    ),
    "split": _rearranging(
        rules.rearranging(rules_rearrange.split),
        dim_maps.rearranged(dim_maps.sliced)._replace(picked=dim_maps.cut_to_one),
        token_axis.except_along("axis"),
        "fused",
    ),
    "unstack": _rearranging(
        rules.rearranging(rules_rearrange.unstack),
        dim_maps.rearranged(dim_maps.unstacked)._replace(picked=dim_maps.unstacked_axis),
        token_axis.unstack,
        "fused",
    ),
    "rev": _rearranging(
        rules.rearranging(rules_rearrange.reverse),
        dim_maps.SAME_RANK,
        token_axis.except_along("dimensions"),
        "fused",
    ),
    "pad": _rearranging(
        rules.rearranging(rules_rearrange.pad), dim_maps.SAME_RANK, token_axis.uncut, "fused"
    ),
    "concatenate": _rearranging(
        rules.concatenate, dim_maps.SAME_RANK, token_axis.except_along("dimension"), "fused"
    ),
    "stack": _rearranging(
        rules.stack,
        dim_maps.SAME_SHAPE._replace(maps=dim_maps.stacked),
        token_axis.stack,
        "fused",
    ),
    "tile": _rearranging(
        rules.rearranging(rules_rearrange.tile), dim_maps.SAME_RANK, token_axis.lost, "fused"
    ),
    # Sums: over dims of a weight, and of weights.
    "reduce_sum": _joining(rules.reduce_sum, dim_maps.REDUCED, token_axis.reduction, "sum"),
    "cumsum": _joining(
        rules.reducing(rules_reduce.cumsum),
        dim_maps.SAME_SHAPE,
        token_axis.elementwise,
        "reader",
    ),
    "fft": _joining(
        rules.reducing(rules_reduce.fft), dim_maps.SAME_RANK, token_axis.lost, "kernel"
    ),
    **dict.fromkeys(
        ("add", "add_any"),
        _joining(rules.add, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    ),
    "sub": _joining(rules.subtract, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    "complex": _joining(rules.complex_, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    "real": _joining(rules.real, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    "imag": _joining(rules.real, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    "conj": _joining(rules.conj, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    "mul": Primitive(
        rule=rules.product,
        many=many_rules.elementwise_product,
        body=None,
        dims=dim_maps.SCALED,
        tokens=token_axis.elementwise,
        memory="fused",
    ),
    **dict.fromkeys(
        ("square", "integer_pow"),
        _joining(rules.square, dim_maps.SAME_SHAPE, token_axis.elementwise, "fused"),
    ),
    "div": _rearranging(rules.quotient, dim_maps.DIVIDED, token_axis.elementwise, "costly"),
    "optimization_barrier": _rearranging(
        rules.barrier, dim_maps.PAIRWISE, token_axis.pairwise, "view"
    ),
    "device_put": _rearranging(rules.device_put, dim_maps.PAIRWISE, token_axis.pairwise, "fused"),
    "neg": _unchanged(rules.rearranging(rules_rearrange.negate), "fused"),
    "convert_element_type": _unchanged(rules.convert, "fused"),
    "reshard": _unchanged(rules.rearranging(rules_rearrange.reshard), "fused"),
    "sharding_constraint": _unchanged(rules.constraint, "view"),
    "copy": _unchanged(rules.binding(rules_rearrange.leafwise), "view"),
    "copy_p": _unchanged(rules.binding(rules_rearrange.leafwise), "fused"),
    "stop_gradient": _unchanged(rules.binding(rules_rearrange.leafwise), "view"),
    "pvary": _unchanged(rules.binding(rules_rearrange.leafwise), "view"),
    # `jax.ad_checkpoint.checkpoint_name`.
    "name": _unchanged(rules.binding(rules_rearrange.named), "view"),
    "reduce_precision": _unchanged(rules.binding(rules_rearrange.base_only), "view"),
    # Control: a jaxpr inside. The rule enters it, so an equation inside meets its own row.
    "jit": _control(rules_call.jit, "call", "call"),
    "closed_call": _control(rules_call.closed_call, "call", "call"),
    "remat": _control(rules_call.remat, "call", "call"),
    "shard_map": _control(
        rules_call.shard_map,
        "call",
        "call",
        many_rules.one_for_row("it goes into a shard_map"),
    ),
    "custom_jvp_call": _control(rules_custom.custom_jvp, "call", "call"),
    "custom_vjp_call": _CUSTOM_VJP,
    "custom_vjp_call_jaxpr": _CUSTOM_VJP,
    "custom_linear_solve": _control(
        rules_custom.linear_solve,
        "solve",
        "kernel",
        many_rules.one_for_row("it goes into a linear solve"),
    ),
    "scan": _control(rules_loop.scan, "scan", "reader"),
    "while": _control(rules_loop.while_loop, "while", "reader"),
    "cond": _control(rules_loop.cond, "cond", "reader"),
    # Without a rule: nonlinear in a weight, so it is materialized. Models use these on activations,
    # which the dataflow, the token follower and the memory estimate go through.
    **dict.fromkeys(
        "max min abs sign floor ceil round is_finite not and or xor "
        "shift_left shift_right_logical shift_right_arithmetic eq ne lt le gt ge select_n clamp "
        "nextafter population_count clz bitcast_convert_type".split(),
        _elementwise("fused"),
    ),
    **dict.fromkeys(
        "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 "
        "expm1 lgamma log log1p logistic pow rem rsqrt sin sinh sqrt tan tanh".split(),
        _elementwise("costly"),
    ),
    **dict.fromkeys("cumprod cummax cummin cumlogsumexp".split(), _elementwise("reader")),
    **dict.fromkeys(
        "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split(),
        _REDUCTION,
    ),
    **dict.fromkeys(
        "reduce_window reduce_window_sum reduce_window_max reduce_window_min".split(), _WINDOWED
    ),
    # Moves numbers along one dim by their size.
    "sort": _activations(dim_maps.MIXED, token_axis.except_along("dimension"), "reader"),
    "top_k": _activations(dim_maps.SAME_SHAPE, token_axis.top_k, "reader"),
    "scatter": _joining(
        rules.writing(rules_write.scatter), dim_maps.WRITTEN, token_axis.first, "reader"
    ),
    "scatter-add": _SCATTER_ADD,
    "scatter_add": _SCATTER_ADD,
    "dynamic_update_slice": _joining(
        rules.dynamic_update_slice, dim_maps.SAME_SHAPE, token_axis.update, "update"
    ),
    **dict.fromkeys("random_bits threefry2x32 custom_call".split(), _KERNEL),
    "ragged_dot": _activations(dim_maps.SAME_SHAPE, token_axis.lost, "product"),
    "all_gather": _KERNEL,
    "reduce_scatter": _KERNEL,
    "pallas_call": _activations(dim_maps.SAME_SHAPE, token_axis.lost, "kernel"),
    # cuDNN's attention, which `jax.nn.dot_product_attention` takes on NVIDIA GPUs.
    "dot_product_attention_fwd_wrapper": _activations(
        dim_maps.SAME_SHAPE, token_axis.attention, "kernel"
    ),
    "dot_product_attention_bwd_wrapper": _activations(
        dim_maps.SAME_SHAPE, token_axis.pairwise, "kernel"
    ),
    # Our kernels on a mesh: the estimate counts what is inside.
    "custom_partitioning": _activations(dim_maps.SAME_SHAPE, token_axis.lost, "call"),
}


def row_of(name: str) -> Primitive:
    """The row of a primitive, `UNKNOWN` where it has none."""
    return PRIMITIVES.get(name, UNKNOWN)
