"""Faults in the transform: dropout, products, rearrangements, loops, many adapters in a batch."""

from tests.mutants.fault import in_file

FAULTS = [
    *in_file(
        "transform/low_rank.py",
        "tests/laws/test_dropout_law.py",
        ("x / jnp.asarray(1 - v.dropout, x.dtype)", "x"),
    ),
    *in_file(
        "transform/dim_maps.py",
        "tests/plan/test_usage.py tests/plan/test_plan.py tests/plan/test_experts.py",
        ("return large == 0 or (large == 1 and sum(n > 1 for n in own) > 1)", "return large <= 1"),
        ("return k == 0 and scales(eqn, k)", "return scales(eqn, k)"),
        ("if side == k else", "if side != k else"),
        ("rhs_spec[1:], ())", "rhs_spec[:1], ())"),
    ),
    *in_file(
        "transform/rules_consume.py",
        "tests/test_lora_bias.py",
        ("v.bias * expand_to(v.scale.astype(v.bias.dtype), scales, dims)", "v.bias"),
        ("if v.gain is not None or v.bias is not None:", "if v.gain is not None:"),
    ),
    *in_file(
        "transform/rules_consume.py",
        "tests/transform/test_lorafy.py",
        ("        with_dropout(v, lhs, use),\n        a,", "        lhs,\n        a,"),
        ("x = with_dropout(v, lhs, use)\n", "x = lhs\n"),
    ),
    *in_file(
        "transform/rules_gather.py",
        "tests/laws/test_value.py",
        ("fill_value=0)", 'fill_value=params.get("fill_value"))'),
    ),
    *in_file(
        "transform/rules_write.py",
        "tests/laws/test_value.py",
        ('partial(lax.scatter, mode=params["mode"])', "partial(lax.scatter)"),
        ('partial(lax.scatter_add, mode=params["mode"])', "partial(lax.scatter_add)"),
        ('if params["update_jaxpr"] is not None:', "if False:"),
        ('- {role} | {role} & {"s"}', "- {role}"),
    ),
    *in_file(
        "transform/lorafy.py",
        "tests/laws/test_dtype.py",
        ("scale=x.scale.astype(widened(x.w.dtype))", "scale=x.scale"),
    ),
    *in_file(
        "plan/roles.py",
        "tests/plan/test_left_out.py",
        ("any(u.constant and _is_scatter(u)", "any(_is_scatter(u)"),
    ),
    *in_file(
        "train/loss.py",
        "tests/train/test_balance.py",
        ("found + balance * load if", "found + load if"),
    ),
    *in_file(
        "transform/rules_join.py",
        "tests/test_lora_bias.py",
        ("sum(there[1:], there[0]) if there", "there[0] if there"),
    ),
    *in_file(
        "transform/rules_join.py",
        "tests/transform/test_lorafy.py",
        ("if len({(v.dropout, v.key is None) for v in known}) > 1:", "if False:"),
    ),
    *in_file(
        "transform/rules_rearrange.py",
        "tests/transform/test_lorafy.py",
        ("v = v if v.gain is None else folded(v)", "pass"),
    ),
    *in_file(
        "transform/rules_call.py",
        "tests/laws/test_dropout_law.py",
        ("_CALL_SITES + calls[0]", "_CALL_SITES"),
    ),
    *in_file(
        "transform/rules_loop.py",
        "tests/laws/test_dropout_law.py",
        ("held = fold_keys(held, step) if loop.masks else held\n    start, end", "start, end"),
    ),
    *in_file(
        "transform/rules_call.py",
        "tests/transform/test_lorafy.py",
        ('policy=params["policy"]', "policy=None"),
        ("key = (id(compat.open_jaxpr(inner)[0]), tree)",
         "key = (id(compat.open_jaxpr(inner)[0]), len(leaves))"),
    ),
    *in_file(
        "transform/rules_loop.py",
        "tests/transform/test_lorafy.py",
        ("if all(f.get(i) is x for f in each)", "if any(f.get(i) is x for f in each)"),
    ),
    *in_file(
        "transform/eager.py",
        "tests/transform/test_eager.py",
        ("(digest, *map(_placement, leaves),", "(digest,"),
        ('getattr(jax.config, "jax_default_device", None))', "None)"),
        ("_programs.popitem(last=False)", "_programs.popitem()"),
    ),
    *in_file(
        "transform/implicit.py",
        "tests/test_lora_bias.py",
        ("if v.bias is not None:\n        raise", "if False:\n        raise"),
    ),
    *in_file(
        "transform/lorafy.py",
        "tests/transform/test_eager.py",
        ("return not jaxpr.effects and any(", "return any("),
    ),
    *in_file(
        "transform/lorafy.py",
        "tests/laws/test_dropout_law.py tests/test_tree.py",
        ("jax.random.split(key, stack) if stack else key",
         "jnp.broadcast_to(key, stack) if stack else key"),
        ("key = paths.fold_path(lora_key, path)", "key = lora_key"),
    ),
    *in_file(
        "transform/many/grouped.py",
        "tests/transform/many/test_run.py",
        ("scale[:, None, None].astype(form.wide)", "1"),
    ),
    *in_file(
        "transform/many/rows.py",
        "tests/transform/many/test_run.py",
        ("x.ndim or x.shape[axis] != 1", "x.ndim"),
    ),
    *in_file(
        "transform/many/rules.py",
        "tests/transform/many/test_run.py",
        ("lambda k: jax.random.fold_in(k, number)", "lambda k: k"),
    ),
    *in_file(
        "transform/many/lookup.py",
        "tests/transform/many/test_run.py",
        ("if mode == lax.GatherScatterMode.FILL_OR_DROP:", "if False:"),
    ),
    *in_file(
        "transform/many/token_axis.py",
        "tests/transform/many/test_run.py",
        ("        start += len(free)\n", ""),
        (" and not _shifted(eqn, d)", ""),
        ("if after == carry:", "if True:"),
        ("return [ins[0], *", "return [ins[2], *"),
        ("frozenset().union(*ins) - gone", "frozenset().union(*ins)"),
        ("frozenset(d - 1 for d in a if d > 0)", "frozenset(a)"),
    ),
    *in_file(
        "transform/rules_custom.py",
        "tests/laws/test_gradient.py",
        ('eqn.params.get("num_consts", 0)', "0"),
    ),
    *in_file(
        "plan/usage.py",
        "tests/laws/test_plan.py",
        ("any(f.tracks or f.made for f in others)", "any(f.tracks for f in others)"),
    ),
    *in_file(
        "transform/rules_join.py",
        "tests/transform/many/test_run.py",
        ("if any(map(has_many, values)):", "if False:"),
    ),
    *in_file(
        "transform/rules_rearrange.py",
        "tests/laws/test_value.py tests/laws/test_gradient.py",
        ("enumerate(dims) if d in dimensions])", "enumerate(dims) if d in dimensions][:1])"),
    ),
    *in_file(
        "transform/low_rank.py",
        "tests/transform/test_low_rank.py",
        ("    wide = wide_dtype(compute)\n", "    wide = compute\n"),
        ("preferred=wide,\n", "preferred=compute,\n"),
    ),
    *in_file(
        "transform/low_rank.py",
        "tests/laws/test_dropout_law.py",
        ("jax.random.fold_in(key, place), keep", "key, keep"),
    ),
    *in_file(
        "transform/dora.py",
        "tests/transform/test_dora.py",
        ("jnp.sqrt(jnp.maximum(square, 0))", "jnp.sqrt(square)"),
        ("    wide = widened(w.dtype)\n", "    wide = w.dtype\n"),
    ),
    *in_file(
        "transform/rules_rearrange.py",
        "tests/transform/test_low_rank.py",
        ("kind = wide_dtype(array.dtype, factor.dtype)", "kind = array.dtype"),
    ),
    *in_file(
        "transform/rules_reduce.py",
        "tests/transform/test_low_rank.py",
        ("scale=result.scale * copies", "scale=result.scale"),
        ('v = without_gain(v) if v.roles[axis] == "o" else v', "pass"),
        ("v = folded(v) if stacked else without_gain(v)", "v = without_gain(v)"),
    ),
    *in_file(
        "transform/rules_join.py",
        "tests/transform/test_low_rank.py",
        ("[(ar, br), (-ai, bi)]", "[(ar, br), (ai, bi)]"),
    ),
    *in_file(
        "transform/many/rules.py",
        "tests/transform/many/test_run.py",
        ("free.index(token) + (kept if side == 0 else 0)", "free.index(token)"),
    ),
    *in_file(
        "plan/usage.py",
        "tests/plan/test_usage.py",
        ("track.picked) - _parted(eqn, k, track, axes)", "track.picked)"),
        ("if any(shape[i] > 1 and not track.dims[i] <= track.picked for i in free):", "if False:"),
    ),
    *in_file(
        "plan/roles.py",
        "tests/plan/test_usage.py",
        ("if moved and any(shape[d] > 1 for d in outs - moved):", "if moved:"),
        ('min(of_kind, key=lambda use: use.constant and kind == "contract")', "of_kind[0]"),
    ),
    *in_file(
        "plan/decide.py",
        "tests/plan/test_plan.py tests/plan/test_left_out.py",
        ("        and bool(jnp.any(leaf == 1))\n", ""),
        ("adapted.rank == config.rank and", "True and"),
        ("len(left_out) - 10} more", "len(left_out)} more"),
    ),
    *in_file(
        "transform/rules_write.py",
        "tests/transform/test_low_rank.py",
        ('else next((role for role in "io" if role not in v.roles), "s")', 'else "i"'),
    ),
]  # fmt: skip
