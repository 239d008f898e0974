"""What a recipe must know of a model: its sizes, from models.json or from a config.json, and settings that work."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_a2a.recipes.plan import RecipeError

_DATA = Path(__file__).with_name("models.json")

#: Architectures whose SGLang code knows --moe-a2a-backend mooncake in every release from 0.5.17 to 0.5.23.
EP_ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeForCausalLM",
)

#: Architectures that --encoder-only and --language-only take in every release from 0.5.17 to 0.5.23.
ENCODER_ARCHITECTURES = (
    "KimiVLForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)


@dataclass(frozen=True)
class Model:
    """A model as its config.json describes it.

    path: for --model-path, a name on a hub or a folder.
    gpus: of one server, where the user does not say.
    flags: settings that SGLang needs for it.
    """

    path: str
    config: Mapping[str, Any]
    gpus: int | None = None
    flags: tuple[str, ...] = ()

    @property
    def text(self) -> Mapping[str, Any]:
        """The language model's part of the configuration."""
        nested = self.config.get("text_config")
        return {**self.config, **nested} if isinstance(nested, dict) else self.config

    @property
    def vision(self) -> Mapping[str, Any] | None:
        found = self.config.get("vision_config")
        return found if isinstance(found, dict) else None

    @property
    def quantization(self) -> Mapping[str, Any]:
        """Its quantization_config; empty if weights are as they were trained."""
        found = self.text.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def experts(self) -> int:
        """Routed experts of a layer, without redundant ones; 0 for a dense model."""
        return next(filter(None, map(self.count, ("n_routed_experts", "num_experts", "num_local_experts"))), 0)

    @property
    def is_local(self) -> bool:
        return self.path.startswith("/")

    def size(self, name: str) -> int:
        """A positive number of the language model's configuration. Raises RecipeError."""
        return self.whole(name, self.text.get(name), least=1)

    def count(self, name: str) -> int:
        """A number of the language model's configuration, 0 if it is not there. Raises RecipeError."""
        return self.whole(name, self.text.get(name) or 0, least=0)

    def whole(self, name: str, value: object, least: int) -> int:
        """`value`, which the configuration has under `name`, if it is a whole number. Raises RecipeError."""
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RecipeError(
                f"--model {self.path}: its config.json has {name}={value!r}; what fits where follows from this number, "
                f"which must be {least} or more"
            )
        return value

    def first(self, *names: str, default: int) -> int:
        """The first of these that the configuration has."""
        for name in names:
            if self.text.get(name) is not None:
                return self.size(name)
        return default


@functools.cache
def _data() -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = json.loads(_DATA.read_text(encoding="utf-8"))
    return data


def known() -> tuple[str, ...]:
    """Names of the models that need no config.json."""
    return tuple(_data())


def load(path: str, config: str | None = None) -> Model:
    """The model of --model and --config. Raises RecipeError.

    config: a config.json, for models that `known` does not have; a folder as `path` has one of its own.
    """
    _check_path(path)
    if config is None and path.startswith("/") and (Path(path) / "config.json").is_file():
        config = str(Path(path) / "config.json")
    if config is not None:
        return Model(path, _read(config))
    entry = _data().get(path)
    if entry is None:
        raise RecipeError(
            f"--model {path}: not one of the models that need no config.json ({', '.join(known())}); give --config "
            "config.json, its configuration file"
        )
    entry = {**_data().get(entry.get("like", ""), {}), **entry}
    return Model(path, entry["config"], entry["gpus"], tuple(entry.get("flags", ())))


def _check_path(path: str) -> None:
    if not path or path.startswith("-"):
        raise RecipeError(f"--model {path!r}: begins with a dash or is empty; give a name on a hub, or a folder")
    if path.startswith((".", "~")):
        raise RecipeError(f"--model {path}: another folder on every host; give a name on a hub, or a folder from / on")
    if not path.isprintable():
        raise RecipeError(f"--model {path!r}: has characters that cannot be printed; give a name on a hub, or a folder")
    if ":" in path:
        raise RecipeError(f"--model {path}: SGLang takes no colon in the name that it serves; rename the folder")


def _read(file: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"--config {file}: cannot be read ({error.strerror}); give a model's config.json") from error
    except ValueError as error:
        raise RecipeError(f"--config {file}: not JSON ({error}); give a model's config.json") from error
    except RecursionError as error:
        raise RecipeError(f"--config {file}: too deep for JSON; give a model's config.json") from error
    names = content.get("architectures") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise RecipeError(f"--config {file}: has no architectures; give a model's config.json")
    found: Mapping[str, Any] = content
    return found
