"""Megatron-core without a GPU: every CUDA-only name of it that we replace, and why.

Megatron-core has no CPU path. `install()` gives it one when, and only when, torch sees no GPU. Nothing in torch itself
is touched, because other libraries in this process (transformers above all: patched factories silently corrupted its
rotary tables) must see the real thing. Instead, as each `megatron.core` module is imported,

* its global name `torch` is rebound to a view of torch in which "cuda" means the CPU and gloo takes uneven parts,
* the names of `REPLACEMENTS` are rebound,
* in the functions of `REWRITES`, `tensor.cuda()` becomes `tensor.cpu()` and type names such as "torch.cuda.FloatTensor"
  become the CPU's: methods of tensors can't be seen by one module only, so the functions' own names are changed,
* what `lean` lists is left out: it takes time at every start of a rank and is of no use here.

`tests/platform` walks the two tables and fails with the entry's reason when the installed Megatron-core no longer has a
name, so an upgrade can't silently lose one.
"""

import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

import torch
import torch.distributed as dist

from megatron_joy.platform import lean
from megatron_joy.platform.adamw import GroupStepAdamW

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Replacement:
    """One global name of a Megatron-core module that is rebound on a machine without a GPU."""

    module: str
    name: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Rewrite:
    """A function in whose code 'cuda' means the CPU: as a method or module (`.cuda`), and inside type names."""

    module: str
    qualname: str
    reason: str


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _split_sizes_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _rope_of_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    """Chunks r and 2*cp-1-r of 2*cp, along `seq_dim`."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    return torch.cat([chunks[cp_group.rank()], chunks[2 * cp_group.size() - 1 - cp_group.rank()]], dim=seq_dim)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        "megatron.core.jit", "jit_fuser", _uncompiled, "fusing needs a compiler at run time and gains nothing on a CPU"
    ),
    Replacement(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_rng_state,
        "the tracked generator is the CPU's default one",
    ),
    Replacement(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "the tracked generator is the CPU's default one",
    ),
    Replacement(
        "megatron.core.transformer.moe.moe_utils",
        "maybe_move_tensor_to_cpu",
        _split_sizes_to_numpy,
        "all-to-all split sizes become numpy only when they come from a GPU; gloo refuses tensors",
    ),
    Replacement(
        "megatron.core.models.common.embeddings.rope_utils",
        "get_pos_emb_on_this_cp_rank",
        _rope_of_this_cp_rank,
        "pins memory and moves indices with .cuda(non_blocking=True)",
    ),
    Replacement(
        "megatron.core.models.common.embeddings.rotary_pos_embedding",
        "get_pos_emb_on_this_cp_rank",
        _rope_of_this_cp_rank,
        "as above, where it is used",
    ),
    Replacement("megatron.core.optimizer", "Adam", GroupStepAdamW, "stands in for Transformer Engine's FusedAdam"),
    Replacement(
        "megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", False, "GroupStepAdamW keeps state as FusedAdam does"
    ),
    Replacement("megatron.core.optimizer.distrib_optimizer", "Adam", GroupStepAdamW, "as above"),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer",
        "HAVE_APEX_OR_TE",
        True,
        "the other branch can't load optimizer state (it looks for a per-tensor 'step')",
    ),
    Replacement(
        "megatron.core.optimizer.distrib_optimizer",
        "USING_TE_OPTIMIZER",
        True,
        "takes the step from the parameter group, where GroupStepAdamW keeps it",
    ),
)

_TYPES = "compares Tensor.type() with torch.cuda.* names"
_MOVES = "moves a tensor with .cuda()"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
REWRITES: tuple[Rewrite, ...] = (
    Rewrite("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32", _TYPES),
    Rewrite(_OPTIMIZER, "DistributedOptimizer._build_model_and_main_param_groups", _TYPES),
    Rewrite(_OPTIMIZER, "DistributedOptimizer.__init__", _TYPES),
    Rewrite(_OPTIMIZER, "DistributedOptimizer.get_parameter_state_dp_zero", _MOVES),
    Rewrite(
        "megatron.core.models.common.language_module.language_module",
        "LanguageModule.setup_embeddings_and_output_layer",
        _MOVES,
    ),
)


class _Stream:
    """CPU work is synchronous: a stream has nothing to order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()


class _Event:
    """The event of a `_Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


class _View(types.ModuleType):
    """A module that answers some names itself and asks the real module for all others."""

    def __init__(self, real: types.ModuleType, own: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(own)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "empty_strided")
_FACTORIES_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")


def _cuda_view() -> types.ModuleType:
    nvtx = _View(torch.cuda.nvtx, {"range_push": _ignore, "range_pop": _ignore, "range": _nothing})
    random = _View(
        torch.cuda.random,
        {"get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state, "manual_seed": torch.manual_seed},
    )
    own: dict[str, Any] = {
        "current_device": lambda: CPU,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": _nothing,
        "nvtx": nvtx,
        "random": random,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
    }
    own |= dict.fromkeys(("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats"), _ignore)
    own |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), _zero)
    return _View(torch.cuda, own)


_CUDA_ON_CPU = _cuda_view()


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    out = tensor.new_zeros((rows, *tensor.shape[1:]))
    out[: len(tensor)] = tensor
    return out


def _even(tensors: Sequence[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
    """`torch.distributed.all_gather` that lets ranks give different numbers of rows, as NCCL's does and gloo's doesn't.

    Megatron-core asks for it where experts are split over ranks (ETP) that got different numbers of tokens (EP).
    """
    if _even(tensor_list) or async_op:
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    rows = max(len(part) for part in tensor_list)
    gathered = [part.new_empty((rows, *part.shape[1:])) for part in tensor_list]
    dist.all_gather(gathered, _padded(tensor, rows), group=group)
    for part, found in zip(tensor_list, gathered, strict=True):
        part.copy_(found[: len(part)])
    return None


def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """`torch.distributed.reduce_scatter` for parts of different numbers of rows; the way back of `all_gather`."""
    if _even(input_list) or async_op:
        return dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    rows = max(len(part) for part in input_list)
    scattered = output.new_empty((rows, *output.shape[1:]))
    dist.reduce_scatter(scattered, [_padded(part, rows) for part in input_list], op=op, group=group)
    output.copy_(scattered[: len(output)])
    return None


_DISTRIBUTED_ON_CPU = _View(dist, {"all_gather": all_gather, "reduce_scatter": reduce_scatter})
_TORCH_ON_CPU = _View(
    torch,
    # "cpu" too, because rewritten functions ask for `torch.cpu.current_device()`
    {"cuda": _CUDA_ON_CPU, "cpu": _CUDA_ON_CPU, "distributed": _DISTRIBUTED_ON_CPU}
    | {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES + _FACTORIES_LIKE},
)


def _rename(constant: Any) -> Any:
    if isinstance(constant, tuple):
        return tuple(_rename(item) for item in constant)
    return constant.replace("torch.cuda.", "torch.") if isinstance(constant, str) else constant


def resolve(module: types.ModuleType, qualname: str) -> Any:
    """The function 'Class.method' or 'function' of a module; AttributeError when it is gone."""
    target: Any = module
    for part in qualname.split("."):
        target = getattr(target, part)
    return getattr(target, "__func__", target)


def _rewrite(module: types.ModuleType, entry: Rewrite) -> None:
    function = resolve(module, entry.qualname)
    code = function.__code__
    function.__code__ = code.replace(
        co_consts=tuple(_rename(constant) for constant in code.co_consts),
        co_names=tuple("cpu" if name == "cuda" else name for name in code.co_names),
    )


def _adapt(module: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = _TORCH_ON_CPU  # type: ignore[attr-defined]
    for entry in REPLACEMENTS:
        if entry.module == module.__name__:
            setattr(module, entry.name, entry.value)
    for rewrite in REWRITES:
        if rewrite.module == module.__name__:
            _rewrite(module, rewrite)


class _AdaptingLoader(SourceFileLoader):
    """Loads a module from its source as usual, then adapts it."""

    def get_code(self, fullname: str) -> types.CodeType | None:
        if fullname not in lean.COMPILED:
            return super().get_code(fullname)
        # Past the cache of bytecode, which other programs share.
        return compile(lean.undecorated(self.get_data(self.path)), self.path, "exec")

    def exec_module(self, module: types.ModuleType) -> None:
        with warnings.catch_warnings(), lean.without(lean.OPTIONAL.get(module.__name__)):
            # Each module says that there is no Transformer Engine and no apex: that is why we are here.
            warnings.simplefilter("ignore")
            super().exec_module(module)
        _adapt(module)


class _MegatronFinder(MetaPathFinder):
    """Finds `megatron.core` modules where they are and has them adapted after loading."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _AdaptingLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> bool:
    """Prepares this process for Megatron-core without a GPU; call before the first import of `megatron.core`.

    Returns True if the stand-ins are in place, False on a machine with a GPU, where nothing is replaced. Calling it
    again is harmless. Raises RuntimeError when Megatron-core was imported before (a bug of the caller).
    """
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return True
    early = [name for name in sys.modules if name.startswith("megatron.core")]
    if early:
        raise RuntimeError(f"{early[0]} was imported before megatron_joy.platform.cpu.install()")
    sys.meta_path.insert(0, _MegatronFinder())
    # Megatron-core takes Transformer Engine's kernels wherever it can import them, also where no GPU can run them
    # (this process was told to see none, say), and a half-installed one ends its import. None makes an ImportError.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # With one generator for both, what Megatron-core warns of here on every fork of it is what must happen.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    return True
