"""Where a model's weights go: one device, or all GPUs that a worker was given. No GPU is needed."""

import gc
import weakref

import pytest
import torch
from model_kit import build_config

from mllm_shapx.models.base import OutOfMemory
from mllm_shapx.models.devices import Placement, devices_of, memory_errors, place_model

GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch report two GPUs with 10 and 20 GiB free, both given to this process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((10 + 10 * index) * GIB, 40 * GIB))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("asked", [None, "cuda"])
def test_a_worker_with_two_gpus_spreads_the_model_over_them(asked: str | None) -> None:
    """Each takes weights up to a share of its free memory, and main memory takes none."""
    placement = place_model(asked)
    assert placement.device == torch.device("cuda:0")
    assert placement.options["device_map"] == "auto"
    assert placement.options["max_memory"] == {0: int(8.5 * GIB), 1: int(17 * GIB), "cpu": 0}


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("asked", ["cuda:1", "cpu"])
def test_a_device_that_is_named_is_the_only_one(asked: str) -> None:
    assert place_model(asked).options == {"device_map": asked}


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_were_not_given_to_the_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA_VISIBLE_DEVICES, as in a plain shell, the model goes to one GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert place_model(None).options == {"device_map": "cuda"}


@pytest.mark.parametrize(("share", "fits"), [(0.8, True), (0.4, False)])
def test_a_model_is_cut_between_layers_or_refused_when_the_gpus_are_too_small(
    share: float, *, fits: bool
) -> None:
    """accelerate's map for two devices that hold `share` of the weights each; no part may go to the disk."""
    import transformers
    from transformers.integrations.accelerate import _get_device_map

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(build_config("llama", 400))
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    memory = {0: int(share * size), 1: int(share * size), "cpu": 0}
    model.hf_device_map = _get_device_map(model, "auto", memory, None)
    placement = Placement(torch.device("cuda:0"), {"device_map": "auto", "max_memory": memory})
    if fits:
        placement.check(model)
        assert devices_of(model) == ["cuda:0", "cuda:1"]
        assert placement.notes(model) == ("the model is spread over 2 devices: cuda:0, cuda:1",)
    else:
        with pytest.raises(OutOfMemory, match="larger than the free memory of cuda:0, cuda:1"):
            placement.check(model)


def test_full_memory_frees_what_the_failed_pass_holds() -> None:
    """The smaller batch that follows needs the memory; the collector may come much later."""
    held: list[weakref.ref[torch.Tensor]] = []

    def forward() -> None:
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise MemoryError("the memory is full")

    gc.disable()
    try:
        with pytest.raises(OutOfMemory, match="the memory is full"), memory_errors(torch.device("cpu")):
            forward()
        assert held[0]() is None
    finally:
        gc.enable()
