"""What is changed in which xfuser module, when, and how it is undone.

:mod:`swiftfusion_xdit.bootstrap` calls :func:`after_import` with each hooked module right after it
has executed. With ``usp`` the changes amount to new flags and to wrappers that call the original;
USP and the groups are touched when a runtime state asks for another strategy.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from swiftfusion_xdit import bootstrap
from swiftfusion_xdit.xdit import args as args_module
from swiftfusion_xdit.xdit import capture, compat, corrections, cpu_mode, options
from swiftfusion_xdit.xdit.options import Options
from swiftfusion_xdit.xdit.patches import Patches

logger = logging.getLogger(__name__)

OPTIONS_ATTRIBUTE = "swiftfusion_options"
NUM_HEADS_ATTRIBUTE = "swiftfusion_num_heads"

notes = compat.Notes()
_patches = Patches()
_layout = Patches()  # of the groups, under tas
_hooked: set[str] = set()
_enabled: dict[str, Any] = {}
_warned = False


def after_import(module: ModuleType) -> None:
    """Apply this module's changes, once. What fails becomes a compatibility note.

    Raises:
        IncompatibleXfuserError: the parsers cannot be extended and a strategy is asked for.
    """
    name = module.__name__
    if name in _hooked:
        return
    _hooked.add(name)
    check, apply = _HOOKS.get(name, (None, None))
    problems = check(module) if check else []
    for problem in problems:
        notes.add(problem)
    try:
        if cpu_mode.is_wanted():
            cpu_mode.apply(module, _patches)
        if apply is not None and not problems:
            apply(module)
    except Exception as error:
        logger.debug("hook on %s failed", name, exc_info=True)
        notes.add(f"hooking into {name} failed: {error!r}")
    extended = getattr(module, "xFuserArgs", None)
    if name == "xfuser.config.args" and not hasattr(extended, "sp_strategy"):
        _refuse_flags()


def resolve(flags: dict[str, Any]) -> Options:
    """The options in force; refuses an unknown xfuser unless the strategy is ``usp``."""
    global _warned
    resolved = options.resolve(flags, _enabled)
    if resolved.strategy != "usp":
        notes.require(resolved.strategy)
    elif not _warned and (problems := notes.problems()):
        _warned = True
        logger.warning("swiftfusion_xdit does not know this xfuser: %s", "; ".join(problems))
    return resolved


def _refuse_flags() -> None:
    """The parsers could not be extended: say so now, where a strategy was asked for."""
    asked = _enabled.get("strategy") or options.from_environment("strategy")
    for i, word in enumerate(sys.argv):
        flag, equals, value = word.replace("-", "_").partition("=")
        if flag == "__sp_strategy":
            asked = value if equals else (sys.argv[i + 1 : i + 2] or ["torus"])[0]
    if asked != "usp":
        notes.require(asked)


def attach_options(engine_config: Any, resolved: Options) -> None:
    """Keep the options with the config that travels to the runtime state, and check them."""
    parallel = engine_config.parallel_config
    if resolved.strategy != "usp":
        resolved.check_degrees(
            sp_degree=parallel.sp_degree,
            tp_degree=parallel.tp_degree,
            world_size=parallel.world_size,
        )
    setattr(parallel, OPTIONS_ATTRIBUTE, resolved)


def options_of(parallel_config: Any) -> Options:
    found = getattr(parallel_config, OPTIONS_ATTRIBUTE, None)
    return found if found is not None else resolve({})


def _hook_args(module: ModuleType) -> None:
    extended = args_module.extend(module.xFuserArgs, resolve, attach_options)
    _patches.set(module, "xFuserArgs", extended, follow=True)
    capture.install(_patches)


def _hook_runtime_state(module: ModuleType) -> None:
    base, dit = module.RuntimeState, module.DiTRuntimeState
    _wrap(base, "__init__", _runtime_state_init)
    _wrap(base, "_check_distributed_env", _check_distributed_env)
    _wrap(base, "_check_if_backend_compatible_with_current_configuration", _check_backend)
    _wrap(dit, "__init__", _dit_runtime_state_init)
    _wrap(dit, "_check_model_and_parallel_config", _check_heads)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by a method that calls ``wrapper(original, self, ...)``."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    _patches.set(owner, name, method)


def _dit_runtime_state_init(
    original: Callable[..., None], state: Any, pipeline: Any, config: Any
) -> None:
    try:
        num_heads = state._get_model_attention_heads(pipeline)
    except (AttributeError, RuntimeError, TypeError):
        num_heads = None
    setattr(state, NUM_HEADS_ATTRIBUTE, num_heads)
    original(state, pipeline, config)


def _runtime_state_init(original: Callable[..., None], state: Any, config: Any) -> None:
    original(state, config)
    from swiftfusion_xdit.xdit import session

    session.start(state, options_of(config.parallel_config))


def _check_distributed_env(original: Callable[..., None], state: Any, parallel_config: Any) -> None:
    resolved = options_of(parallel_config)
    if resolved.strategy != "usp":
        resolved.check_degrees(
            sp_degree=parallel_config.sp_degree,
            tp_degree=parallel_config.tp_degree,
            world_size=parallel_config.world_size,
        )
    original(state, parallel_config)
    if resolved.strategy == "tas":
        from swiftfusion_xdit.xdit import groups

        num_heads = getattr(state, NUM_HEADS_ATTRIBUTE, None)
        groups.lay_out_tas(parallel_config, resolved, num_heads, _layout)


def _check_backend(original: Callable[..., None], state: Any, attention_backend: Any) -> None:
    # xDiT refuses backends that give it no LSE once ring_degree > 1. Torus brings kernels of its
    # own and runs no ring of xDiT's, unless it may fall back to xDiT's path.
    config = state.parallel_config
    with _as_if_one(config, "ring_degree", when=_replaces_usp(config)):
        original(state, attention_backend)


def _check_heads(
    original: Callable[..., None], state: Any, pipeline: Any, parallel_config: Any
) -> None:
    # Head groups may be uneven under torus; the mesh checks that none is empty.
    when = _replaces_usp(parallel_config)
    with _as_if_one(parallel_config.sp_config, "ulysses_degree", when=when):
        original(state, pipeline=pipeline, parallel_config=parallel_config)


def _replaces_usp(parallel_config: Any) -> bool:
    resolved = options_of(parallel_config)
    return resolved.strategy == "torus" and resolved.fallback == "error"


def _correct(module: ModuleType) -> None:
    for problem in corrections.apply(module, _patches):
        notes.add(problem)


class _as_if_one:
    """Show a degree as 1 for the length of a check."""

    def __init__(self, config: Any, name: str, *, when: bool) -> None:
        self.config, self.name, self.when = config, name, when

    def __enter__(self) -> None:
        self.degree = getattr(self.config, self.name)
        if self.when:
            setattr(self.config, self.name, 1)

    def __exit__(self, *_: object) -> None:
        setattr(self.config, self.name, self.degree)


_Hook = tuple[Callable[[ModuleType], list[str]] | None, Callable[[ModuleType], None] | None]
_HOOKS: dict[str, _Hook] = {
    "xfuser.config.args": (compat.check_args, _hook_args),
    "xfuser.core.distributed.runtime_state": (compat.check_runtime_state, _hook_runtime_state),
    "xfuser.core.distributed.parallel_state": (compat.check_parallel_state, None),
    "xfuser.model_executor.layers.usp": (compat.check_usp, None),
    **dict.fromkeys(corrections.CORRECTED, (None, _correct)),
}


def enable(strategy: str | None = None, **values: Any) -> None:
    """See :func:`swiftfusion_xdit.enable`."""
    chosen = {"strategy": strategy, **values}
    if unknown := set(chosen) - set(options.PARSERS):
        raise ValueError(
            f"enable() takes {', '.join(options.PARSERS)}; unknown: {', '.join(sorted(unknown))}"
        )
    for name, value in chosen.items():
        if value is not None:
            options.parse(name, value, source=f"enable({name}=)")
    _enabled.clear()
    _enabled.update({name: value for name, value in chosen.items() if value is not None})
    bootstrap.install()
    runtime_state = sys.modules.get("xfuser.core.distributed.runtime_state")
    if "xfuser" in sys.modules and strategy not in (None, "usp"):
        notes.require(str(strategy))
    if runtime_state is not None and runtime_state.runtime_state_is_initialized():
        _restart(runtime_state.get_runtime_state())


def _restart(state: Any) -> None:
    """Bring a runtime state that exists already to the options in force now."""
    from swiftfusion_xdit.xdit import groups, session

    resolved = resolve({})
    parallel_config = state.parallel_config
    setattr(parallel_config, OPTIONS_ATTRIBUTE, resolved)
    if resolved.strategy == "tas":
        raise NotImplementedError(
            "enable(strategy='tas') lays out the process groups anew: call it before xDiT's "
            "runtime state is initialized"
        )
    if resolved.strategy != "usp":
        sp_group = groups.sp_group()
        resolved.check_degrees(
            sp_degree=sp_group.world_size,
            tp_degree=parallel_config.tp_degree,
            world_size=parallel_config.world_size,
        )
    session.start(state, resolved)


def disable() -> None:
    """See :func:`swiftfusion_xdit.disable`."""
    global _warned
    bootstrap.uninstall()
    session = sys.modules.get("swiftfusion_xdit.xdit.session")
    if session is not None:
        session.stop()
    _layout.undo()
    _patches.undo()
    _hooked.clear()
    _enabled.clear()
    notes.clear()
    _warned = False
