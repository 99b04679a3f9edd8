"""One warning, at import, about a jaxlib release that computes wrong numbers."""

import warnings

import jaxlib

MISCOMPILING_VERSION = "0.10.2"


def warn_if_miscompiling() -> None:
    """Warns where the loaded jaxlib silently miscompiles per-example gradient norms."""
    if jaxlib.__version__ == MISCOMPILING_VERSION:  # type: ignore[attr-defined]
        warnings.warn(
            f"jaxlib {MISCOMPILING_VERSION} computes wrong numbers on CPU (jax issue 39103): a "
            "vmapped matrix-vector product followed by a sum of squares, which is the shape of a "
            "per-example gradient norm. Install another version of jax and jaxlib, for example "
            '`pip install "jax!=0.10.2" "jaxlib!=0.10.2"`.',
            UserWarning,
            stacklevel=3,
        )
