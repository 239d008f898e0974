"""Encoder, prefill and decode apart, for vision-language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_a2a.recipes import memory, ports, servers
from moe_a2a.recipes.hosts import Group
from moe_a2a.recipes.models import ENCODER_ARCHITECTURES, Model
from moe_a2a.recipes.plan import Plan, RecipeError
from moe_a2a.recipes.servers import Kind, Policy, Ports, Settings
from moe_a2a.recipes.text import Page

#: --encoder-transfer: how embeddings go from encoders to prefill servers.
ENCODER_TRANSFERS = ("zmq_to_scheduler", "zmq_to_tokenizer", "mooncake")

_TEXTS = {
    "zmq_to_scheduler": "over TCP (ZeroMQ), to the schedulers of the prefill server",
    "zmq_to_tokenizer": "over TCP (ZeroMQ), to the tokenizer process of the prefill server, which hands them on",
    "mooncake": "through the Mooncake Transfer Engine",
}

#: A red square of 64 x 64 pixels, as PNG.
_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAT0lEQVR42u3PQQkAAAgEsIty/VMYzQi+hcEKLNO+FgEBAQEBAQEB"
    "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQGBywLQIADxkgTHrwAAAABJRU5ErkJggg=="
)


def plan(
    settings: Settings,
    encode: Sequence[Group],
    prefill: Sequence[Group],
    decode: Sequence[Group],
    router_host: str,
    gpu_memory_gib: float,
    given: Ports,
    policy: Policy,
    transfer: str,
) -> Plan:
    """xEyPzD: any number of servers of each role. Raises RecipeError."""
    model = settings.model
    _check_model(model, encode)
    page = Page(settings)
    for gpus in dict.fromkeys(one.gpus for one in (*prefill, *decode)):
        memory.check_parts(model, gpus)
        share = memory.share(model, gpus, gpu_memory_gib)
        page.fits(f"weights of a prefill or decode server on {gpus} {'GPU' if gpus == 1 else 'GPUs'}", share)
    over = ("--encoder-transfer-backend", transfer)
    encoders = servers.build(
        settings, Kind("encode", _encoder_flags(settings, over), _env(settings, transfer)), encode, given
    )
    urls = tuple(server.url for server in encoders if server.node == 0)
    language = Kind(
        "prefill",
        ("--language-only", "--encoder-urls", *urls, *over),
        ports=(("encoder bootstrap", "--encoder-bootstrap-port", ports.ENCODER_BOOTSTRAP),),
    )
    found = (
        *encoders,
        *servers.build(settings, language, prefill, given),
        *servers.build(settings, Kind("decode"), decode, given),
    )
    gate = servers.router(router_host, given.router, found, policy)
    ports.check((*found, gate))
    page.processes = (*found, gate)
    page.what(
        "Encoders have the vision part of the model and turn images into embeddings. A prefill server, which has the "
        f"language part, sends the images of a request to them and gets the embeddings {_TEXTS[transfer]}. It computes "
        "the KV cache of the prompt with them and sends it to a decode server, GPU to GPU. Requests without images "
        "never meet an encoder."
    )
    page.transfer()
    return Plan(
        name="epd",
        title=page.title("encoder, prefill and decode apart"),
        servers=found,
        router=gate,
        checks=servers.checks(found, gate, "/v1/chat/completions", _request(model)),
        text=page.text(),
        volumes=settings.volumes,
        image=settings.image,
        rdma=settings.transfer != "mooncake_tcp",
    )


def _check_model(model: Model, encode: Sequence[Group]) -> None:
    if model.architecture not in ENCODER_ARCHITECTURES:
        raise RecipeError(
            f"--model {model.path}: SGLang has no encoder server for {model.architecture}; give a model of "
            f"{', '.join(ENCODER_ARCHITECTURES)}, or use `moe-a2a recipe pd`"
        )
    heads = (model.vision or {}).get("num_heads")
    for one in encode:
        if isinstance(heads, int) and heads % one.gpus:
            raise RecipeError(
                f"--encode {one.text}: the vision encoder's {heads} heads cannot be cut into {one.gpus} equal parts; "
                "give encoders 1 GPU"
            )


def _encoder_flags(settings: Settings, over: tuple[str, ...]) -> tuple[str, ...]:
    devices = ("--disaggregation-ib-device", settings.ib_devices) if settings.ib_devices is not None else ()
    return ("--encoder-only", *over, *devices)


def _env(settings: Settings, transfer: str) -> Mapping[str, str]:
    """The Transfer Engine of an encoder hears of --transfer mooncake_tcp by this variable alone."""
    return {"MC_FORCE_TCP": "1"} if transfer == "mooncake" and settings.transfer == "mooncake_tcp" else {}


def _request(model: Model) -> Mapping[str, object]:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_IMAGE}"}}
    question = {"type": "text", "text": "Which colour is this?"}
    message = {"role": "user", "content": [image, question]}
    return {"model": model.path, "messages": [message], "max_tokens": 16, "temperature": 0}
