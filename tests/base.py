"""One tester for every module. A test class names the module, a tiny configuration and its input, and inherits
the checks that hold for all::

    class TestPixelDecoder(ModuleTests):
        module_class = PixelDecoder
        config = tiny_decoder_config()
        good_sizes = ((4, 4), (3, 5))
        repr_contains = ("Z=8", "stride=8")

        def inputs(self, height, width):
            return (latents(2, height, width),)

        def expected_shapes(self, height, width):
            return [(2, 3, 8 * height, 8 * width)]

What a module cannot do is declared by a flag, and a declared failure must really fail.
"""

import copy
import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psvae.config import Config
from psvae.errors import ShapeError
from tests.tiny import build, fill_weights


class ModuleTests:
    """Inherit, and set the attributes below."""

    module_class: ClassVar[type[Any]]
    config: ClassVar[Any]
    good_sizes: ClassVar[tuple[tuple[int, int], ...]]  # sizes for `inputs`; the first is also the default
    bad_sizes: ClassVar[tuple[tuple[int, int], ...]] = ()  # sizes that must raise `ShapeError`
    repr_contains: ClassVar[tuple[str, ...]]
    presets: ClassVar[tuple[tuple[str, Config], ...]] = ()  # (file under manifests/, configuration)
    exportable: ClassVar[bool] = True

    def inputs(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Two items of that size, seeded."""
        raise NotImplementedError

    def expected_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """Of every tensor that `call` gives for ``inputs(height, width)``."""
        raise NotImplementedError

    def call(self, module: Any, *inputs: Tensor) -> list[Tensor]:
        """Every output tensor, by a call that draws no random numbers."""
        return tree_leaves(module(*inputs))

    def parts(self, module: Any) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
        """What is exported: the module, or its halves where `exportable` is False."""
        return {"module": (module, self.default_inputs())}

    def default_inputs(self) -> tuple[Tensor, ...]:
        return self.inputs(*self.good_sizes[0])

    @pytest.fixture
    def module(self) -> Any:
        return fill_weights(build(self.module_class, self.config))

    # Shapes

    def test_smoke(self, module: Any) -> None:
        with torch.no_grad():
            outputs = self.call(module, *self.default_inputs())
        assert outputs
        assert all(output.isfinite().all() for output in outputs)
        assert all(output.std() > 1e-3 for output in outputs)

    def test_shapes(self, module: Any) -> None:
        for size in self.good_sizes:
            with torch.no_grad():
                shapes = [tuple(output.shape) for output in self.call(module, *self.inputs(*size))]
            assert shapes == self.expected_shapes(*size), f"for an input of {size}"

    @pytest.mark.bad_input
    def test_other_sizes_raise(self, module: Any) -> None:
        for size in self.bad_sizes:
            with pytest.raises(ShapeError, match="wanted multiples of the stride"):
                self.call(module, *self.inputs(*size))

    def test_items_do_not_mix(self, module: Any) -> None:
        inputs = self.default_inputs()
        with torch.no_grad():
            together = self.call(module, *inputs)
            alone = self.call(module, *(x[1:] for x in inputs))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[1:], part, rtol=1e-5, atol=1e-5)

    # Numbers

    def test_golden(self, module: Any, stored_json: Any) -> None:
        with torch.no_grad():
            outputs = self.call(module, *self.default_inputs())
        numbers = {f"output{index}": _summary(output) for index, output in enumerate(outputs)}
        name = type(self).__name__.removeprefix("Test").lower()
        stored = stored_json("goldens", name, _one_line_per_key(numbers))
        assert list(stored) == list(numbers)
        for key, values in stored.items():
            torch.testing.assert_close(torch.tensor(numbers[key]), torch.tensor(values), rtol=1e-4, atol=1e-4)

    def test_eval_is_deterministic(self, module: Any) -> None:
        inputs = self.default_inputs()
        with torch.no_grad():
            assert_equal(self.call(module, *inputs), self.call(module, *inputs))

    def test_inputs_are_left_alone(self, module: Any) -> None:
        inputs = self.default_inputs()
        with torch.no_grad():
            self.call(module, *inputs)
        assert_equal(inputs, self.default_inputs())

    def test_bf16_is_close(self, module: Any) -> None:
        inputs = self.default_inputs()
        with torch.no_grad():
            exact = self.call(module, *inputs)
            half = self.call(copy.deepcopy(module).bfloat16(), *(x.bfloat16() for x in inputs))
        for wanted, got in zip(exact, half, strict=True):
            assert got.dtype == torch.bfloat16
            assert (got.float() - wanted).norm() / wanted.norm() < 0.05

    @pytest.mark.gpu
    def test_cuda_equals_cpu(self, module: Any) -> None:
        inputs = self.default_inputs()
        with torch.no_grad():
            wanted = self.call(module, *inputs)
            got = self.call(module.cuda(), *(x.cuda() for x in inputs))
        for cpu, cuda in zip(wanted, got, strict=True):
            torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-2, atol=1e-2)  # convolutions may run in TF32

    # Gradients

    def test_gradients_are_finite(self, module: Any) -> None:
        gradients = self._gradients(module)
        assert [name for name, gradient in gradients.items() if gradient is None] == []
        assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())

    def test_gradient_checkpointing(self, module: Any) -> None:
        wanted, kept = self._gradients(module), self._bytes_kept_for_backward(module)
        module.enable_gradient_checkpointing()
        got, kept_by_checkpointing = self._gradients(module), self._bytes_kept_for_backward(module)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert kept_by_checkpointing < kept
        module.disable_gradient_checkpointing()
        assert self._bytes_kept_for_backward(module) == kept

    def _loss(self, module: Any) -> Tensor:
        """Every output weighed by fixed random numbers: a plain sum is blind to whatever a norm removes."""
        generator = torch.Generator().manual_seed(1)
        outputs = self.call(module, *self.default_inputs())
        return torch.stack([(y * torch.randn(y.shape, generator=generator)).mean() for y in outputs]).sum()

    def _gradients(self, module: Any) -> dict[str, Any]:
        module.train().zero_grad(set_to_none=True)
        self._loss(module).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}

    def _bytes_kept_for_backward(self, module: Any) -> int:
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self._loss(module.train())
        return kept

    # Weights and configuration

    def test_save_and_load(self, module: Any, tmp_path: Path) -> None:
        module.save_pretrained(tmp_path)
        random = torch.random.get_rng_state()
        loaded = self.module_class.from_pretrained(tmp_path)
        assert torch.random.get_rng_state().equal(random)  # built on the meta device: nothing was initialised
        assert loaded.config == module.config
        assert not loaded.training
        assert_same_state(loaded, module)
        with torch.no_grad():
            assert_equal(self.call(loaded, *self.default_inputs()), self.call(module, *self.default_inputs()))

    def test_save_and_load_bf16(self, module: Any, tmp_path: Path) -> None:
        half = copy.deepcopy(module).bfloat16()
        module.save_pretrained(tmp_path / "fp32")
        half.save_pretrained(tmp_path / "bf16")
        inputs = tuple(x.bfloat16() for x in self.default_inputs())
        for folder in ("fp32", "bf16"):
            loaded = self.module_class.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
            assert_same_state(loaded, half)
            with torch.no_grad():
                assert_equal(self.call(loaded, *inputs), self.call(half, *inputs))
        widened = self.module_class.from_pretrained(tmp_path / "bf16")  # fp32 unless asked otherwise
        assert_equal(widened.state_dict().values(), copy.deepcopy(half).float().state_dict().values())

    def test_config_survives_json(self) -> None:
        text = json.dumps(self.config.to_dict())
        assert type(self.config).from_dict(json.loads(text)) == self.config
        for _, preset in self.presets:
            assert type(preset).from_dict(json.loads(json.dumps(preset.to_dict()))) == preset

    def test_manifests(self, stored_json: Any) -> None:
        for name, preset in self.presets:
            with torch.device("meta"):
                state = self.module_class(preset).state_dict()
            manifest = {key: [list(x.shape), str(x.dtype).removeprefix("torch.")] for key, x in state.items()}
            stored = stored_json("manifests", name, _one_line_per_key(manifest))
            assert manifest == stored, f"{name}: published weights no longer fit; see --update-manifests"
            assert list(manifest) == list(stored), f"{name}: same keys in another order"

    def test_builds_on_the_meta_device(self, module: Any) -> None:
        with _RealBytes() as real, torch.device("meta"):
            empty = self.module_class(self.config)
        assert real.count < 10_000  # small tables of numbers that no checkpoint holds, no weights
        state = empty.state_dict()
        assert [key for key, x in state.items() if not x.is_meta] == []
        assert {key: x.shape for key, x in state.items()} == {key: x.shape for key, x in module.state_dict().items()}
        with torch.no_grad():
            outputs = self.call(empty.to("meta").eval(), *(x.to("meta") for x in self.default_inputs()))
        assert [tuple(output.shape) for output in outputs] == self.expected_shapes(*self.good_sizes[0])

    # Copies and words

    def test_pickle_and_deepcopy(self, module: Any) -> None:
        inputs = self.default_inputs()
        with torch.no_grad():
            wanted = self.call(module, *inputs)
            for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
                assert twin.config == module.config
                assert_same_state(twin, module)
                assert_equal(self.call(twin, *inputs), wanted)

    def test_repr(self, module: Any) -> None:
        text = repr(module)
        for word in (self.module_class.__name__, *self.repr_contains):
            assert word in text

    # Graphs

    @pytest.mark.compile
    def test_compile(self, module: Any) -> None:
        torch.compiler.reset()
        inputs = self.default_inputs()
        with torch.no_grad():
            wanted = self.call(module, *inputs)
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            assert_close(self.call(compiled, *inputs), wanted)
            other = self.inputs(*self.good_sizes[1])  # a second size makes the graph's shapes dynamic
            assert_close(self.call(compiled, *other), self.call(module, *other))

    @pytest.mark.compile
    def test_export(self, module: Any) -> None:
        if not self.exportable:
            with pytest.raises(Exception):  # noqa: B017, PT011  (whatever export raises)
                torch.export.export(module, self.default_inputs())
        for part, inputs in self.parts(module).values():
            with torch.no_grad():
                program = torch.export.export(part, inputs)
                assert_close(tree_leaves(program.module()(*inputs)), tree_leaves(part(*inputs)))


def assert_equal(got: Any, wanted: Any) -> None:
    """The same tensors, bit for bit."""
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """The same tensors to within ``tolerance``."""
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_state(got: nn.Module, wanted: nn.Module) -> None:
    """Equal keys, dtypes and values, buffers that are not saved included."""
    for kind in ("state_dict", "named_parameters", "named_buffers"):
        a, b = dict(_items(got, kind)), dict(_items(wanted, kind))
        assert list(a) == list(b)
        assert_equal(a.values(), b.values())


def _items(module: nn.Module, kind: str) -> Any:
    found = getattr(module, kind)()
    return found.items() if isinstance(found, dict) else found


def _summary(output: Tensor) -> list[float]:
    """Mean, std and eight values spread over the tensor."""
    flat = output.detach().flatten().double()
    picks = flat[torch.linspace(0, len(flat) - 1, 8).long()]
    return [round(float(x), 6) for x in (flat.mean(), flat.std(), *picks)]


def _one_line_per_key(content: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items()) + "\n}\n"


class _RealBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that is made off the meta device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (x for x in tree_leaves(out) if isinstance(x, Tensor) and not x.is_meta)
        self.count += sum(x.numel() * x.element_size() for x in made)
        return out
