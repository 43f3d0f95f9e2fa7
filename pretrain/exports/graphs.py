"""Graphs that run without this package: ONNX and TorchScript.

Both go from `images`, float32 (B, C, H, W) normalized as `preprocess` does, with any B, to the fields of `Features`:
`patches` (B, N, D) and, where the backbone has them, `cls` (B, D) and `registers` (B, R, D), after the final norm. The
size of the images is the one that the backbone was trained for.

Not here: folders of timm (`folders`), what becomes of the file (`export`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from backbones.images.base import ImageEncoder
from pretrain.errors import RequestError, RunFailed

if TYPE_CHECKING:
    from pretrain.exports.export import Source

__all__ = ["INPUT", "write_onnx", "write_torchscript"]

INPUT = "images"
MOST_BYTES = 2**31 - 2**24  # of the weights in one ONNX file, whose format counts with 31 bits
TOLERANCE = 1e-4  # times the largest number, for arithmetic of other libraries


class _Graph(nn.Module):
    """A backbone that takes and gives plain tensors."""

    def __init__(self, backbone: ImageEncoder) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone.features(images)
        outputs = {"patches": features.patches, "cls": features.cls, "registers": features.registers}
        return {name: output.float() for name, output in outputs.items() if output is not None}


def write_torchscript(source: Source, file: Path) -> None:
    """Make a file for `torch.jit.load`, which gives the outputs as a dict by name.

    Raises:
        RequestError: The backbone does not encode images.
        RunFailed: It cannot be traced, or the trace computes something else.
    """
    graph, few, more = _prepared(source)
    with _quiet("TorchScript", graph), torch.no_grad():
        torch.jit.trace(graph, few, strict=False, check_trace=False).save(str(file))
        found = torch.jit.load(str(file))(more)
        _compare("TorchScript", found, graph(more))


def write_onnx(source: Source, file: Path) -> None:
    """Make an ONNX file; it is run by onnxruntime and compared where that is installed, else only checked.

    Raises:
        RequestError: The backbone does not encode images, or is too large for one file.
        RunFailed: It cannot be exported, or the graph computes something else.
    """
    graph, few, more = _prepared(source)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in graph.state_dict().values())
    if num_bytes > MOST_BYTES:
        raise RequestError(
            f"format onnx: {num_bytes / 2**30:.1f} GiB of weights do not fit into one file, which takes 2"
        )
    with _quiet("ONNX", graph), torch.no_grad():
        expected = graph(more)
        torch.onnx.export(
            graph,
            (few,),
            str(file),
            input_names=[INPUT],
            output_names=list(expected),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        import onnx

        onnx.checker.check_model(str(file))
        if find_spec("onnxruntime") is not None:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            outputs = session.run(list(expected), {INPUT: more.numpy()})
            found = {name: torch.from_numpy(output) for name, output in zip(expected, outputs, strict=True)}
            _compare("ONNX", found, expected)


def _prepared(source: Source) -> tuple[_Graph, Tensor, Tensor]:
    """The graph, and images to record it with and to compare it on, of another number."""
    backbone = source.backbone
    if not isinstance(backbone, ImageEncoder):
        raise RequestError(
            f"backbone {backbone.spec['name']!r} of kind {backbone.spec.get('kind')!r} takes no images, so it has no "
            "graph of them; use --format safetensors"
        )
    size, generator = backbone.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(5, backbone.in_chans, size, size, generator=generator)
    return _Graph(backbone.cpu()).eval(), images[:2], images[2:]


def _compare(form: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, output in expected.items():
        difference = (found[name] - output).abs().max() / output.abs().max().clamp(min=1e-12)
        if found[name].shape != output.shape or not difference <= TOLERANCE:
            raise RunFailed(f"the {form} graph gives other {name} than the backbone ({difference:.1e} of the largest)")


@contextlib.contextmanager
def _quiet(form: str, graph: _Graph) -> Iterator[None]:
    """What recording says on the way is for its authors; what it fails of becomes one line.

    Raises:
        RunFailed: It failed.
    """
    name = graph.backbone.spec["name"]
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (RunFailed, OSError):
        raise
    except Exception as error:  # of any type: models hold what recorders do not know
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunFailed(f"backbone {name!r} cannot be exported as {form}: {reason}") from error
    finally:
        logging.disable(level)
