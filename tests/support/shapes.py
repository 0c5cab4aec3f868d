"""The checker that jaxtyping's import hook uses: of functions that annotate an array's shape."""

from beartype import BeartypeConf, beartype

# As in every type checker, an int is a float.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checker(fn):
    """`fn`, checked where an annotation of it is jaxtyping's.

    Others are pyright's; at run time they would take the place of the errors that tests expect.
    """
    found = getattr(fn, "__annotations__", {}).values()
    return _check(fn) if any("jaxtyping" in str(x) for x in found) else fn
