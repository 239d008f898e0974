"""How SGLang's releases differ in what a recipe writes."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from moe_a2a.recipes.plan import RecipeError
from moe_a2a.sglang_plugin import versions

#: The first release with --attn-dp-size; --enable-dp-attention is deprecated from there on.
_ATTENTION_WIDTH = (0, 5, 22)


@dataclass(frozen=True)
class Release:
    """A release of SGLang that recipes can be for."""

    version: str
    number: tuple[int, ...]

    def attention_data_parallel(self, ranks: int) -> tuple[str, ...]:
        """Flags for attention that is data parallel over `ranks`."""
        if self.number >= _ATTENTION_WIDTH:
            return ("--attn-dp-size", str(ranks))
        return ("--dp-size", str(ranks), "--enable-dp-attention")


def release(version: str) -> Release:
    """The release of --sglang. Raises RecipeError."""
    if not versions.supported(version):
        raise RecipeError(
            f"--sglang {version}: recipes are for SGLang {versions.OLDEST} to {versions.NEWEST}, whose flags they are "
            "checked against; give one of these"
        )
    parsed = Version(version)
    if parsed.is_prerelease:
        raise RecipeError(
            f"--sglang {version}: not yet a release, and its flags may be others; give {parsed.base_version}"
        )
    return Release(parsed.public, parsed.release)
