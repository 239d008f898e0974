"""The releases of SGLang that the plug-in knows."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from moe_a2a.sglang_plugin.limits import FlagError

OLDEST, NEWEST = "0.5.17", "0.5.23"


def supported(version: str) -> bool:
    """Whether a release is in the range; post-releases and local builds of its ends are."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    return Version(OLDEST).release <= release <= Version(NEWEST).release


def check() -> None:
    """Raise FlagError if the installed SGLang is outside the range."""
    import sglang

    version = str(sglang.__version__)
    if not supported(version):
        raise FlagError(
            f"SGLang {version} with --moe-a2a-backend mooncake: moe-a2a serves SGLang {OLDEST} to {NEWEST}; "
            "install one of these, or set MOE_A2A_SGLANG=0 to use Mooncake's own EP"
        )
