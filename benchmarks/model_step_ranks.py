"""The rank's side of model_step.py: puts each way to run a step in force, checks and times it."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.model_step_config import GIB, MAX_ERROR, WARM_UPS, Case, Found, Settings
from benchmarks.model_step_xdit import (
    XditStates,
    build_model,
    compiled_by_xdit,
    compiler_counts,
    step_inputs,
    without_communication,
)
from swiftfusion_xdit import envs
from swiftfusion_xdit.attention.reference import relative_error
from swiftfusion_xdit.cli.bench_parts import Orders, Ranks
from swiftfusion_xdit.cli.bench_report import spread


class ModelStep:
    """This rank's part. Owns the model, and for the length of a size its sessions and graphs."""

    def __init__(self, settings: Settings, ranks: Ranks, device: torch.device) -> None:
        self.settings, self.ranks, self.device = settings, ranks, device
        self.on_gpu = device.type == "cuda"
        model = build_model(settings, device)
        self.model_bytes = sum(x.nbytes for x in model.parameters())
        self.states = XditStates(model, settings)
        self.states.use(*settings.degrees[0], settings.backends[0])  # wrapping looks at them
        self.model = settings.module.wrap(model)
        self.token = torch.zeros(1, device=device)

    def measure(self, size: str) -> dict[str, Any]:
        """All strategies at one size. Every rank returns the same."""
        start_s = time.monotonic()
        self.latents = self.settings.latents(size)
        self.inputs = step_inputs(self.settings, self.latents, self.device)
        self.expected: Tensor | None = None
        self.compile_s = 0.0
        self.sessions: dict[tuple[str, bool | None], Any] = {}
        self.models: dict[Case, Any] = {}
        found = {case: self._first_steps(case) for case in self.settings.cases()}
        cases = [case for case, one in found.items() if one.failure is None]
        rounds, orders = 0, Orders()
        while rounds < self.settings.rounds:
            for case in orders.draw(cases):
                self._turn(case, found[case])
            rounds += 1
            if max(self.ranks.gather(time.monotonic() - start_s)) > self.settings.seconds:
                break
        everyone = self.ranks.gather([vars(one) for one in found.values()])
        self.ranks.barrier()  # peers may still read this rank's memory
        self._forget()
        results = [joined(case, [rank[idx] for rank in everyone]) for idx, case in enumerate(found)]
        tokens = {"image_tokens": self.latents.image_tokens, "text_tokens": self.latents.text}
        return {"size": size, **tokens, "rounds": rounds, "results": compared(results)}

    def _forget(self) -> None:
        import torch._dynamo

        self.models.clear()
        torch._dynamo.reset()  # or the next size would be compiled for changing sizes
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def _in_force(self, case: Case) -> Iterator[None]:
        """Inside, a step of the model runs as ``case`` says."""
        import xfuser.model_executor.layers.usp as usp

        from swiftfusion_xdit.xdit import dispatch
        from swiftfusion_xdit.xdit import session as sessions
        from swiftfusion_xdit.xdit.patches import Patches

        state = self.states.use(case.ulysses, case.ring, case.backend)
        self.settings.module.prepare(state, self.latents)
        patches = Patches()
        try:
            if case.kind == "ours":
                # What attends looks at it when it is made, in the first step.
                if case.layer_graphs is not None:
                    name = envs.variable_name("LAYER_GRAPHS")
                    patches.set_item(os.environ, name, str(int(case.layer_graphs)))
                session = self._session(case, state)
                dispatch.install(usp, session, patches)
                patches.set(sessions, "_current", session)
            elif case.kind == "ceiling":
                stand_in = without_communication(self._kernel(case), self.ranks.size)
                # The code that calls dispatch() in place of USP, with another dispatch().
                patches.set(usp.USP, "__code__", dispatch._usp.__code__)
                patches.set(dispatch, "dispatch", stand_in)
            yield
        finally:
            dispatch.uninstall()
            patches.undo()

    def _session(self, case: Case, state: Any) -> Any:
        from swiftfusion_xdit.xdit import groups
        from swiftfusion_xdit.xdit.options import Options
        from swiftfusion_xdit.xdit.session import Session

        key = (case.schedule, case.layer_graphs)
        if key not in self.sessions:
            options = Options(strategy="torus", schedule=case.schedule)
            self.sessions[key] = Session(state, options, groups.sp_group())
        return self.sessions[key]

    def _sequence_parallel(self, case: Case) -> Any:
        """What ``ours`` attends with, None for others. Collective."""
        if case.kind != "ours":
            return None
        session = self.sessions[case.schedule, case.layer_graphs]
        return session.sequence_parallel(self._kernel(case))

    def _kernel(self, case: Case) -> str:
        from swiftfusion_xdit.xdit.session import GPU_KERNELS

        return GPU_KERNELS[case.backend] if self.on_gpu else "cpu"

    def _step(self, case: Case) -> Tensor:
        if case.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return self.models[case](**self.inputs)[0]

    def _first_steps(self, case: Case) -> Found:
        """Compile if asked, warm up and check; what fails on one rank is left out on all."""
        found = Found(failure=self._over_budget(case))
        if found.failure is None:
            start_s, kept_bytes = time.monotonic(), self._memory("memory_allocated")
            failure = None
            stream = torch.cuda.current_stream() if self.on_gpu else None
            try:
                self._run_first_steps(case, found, kept_bytes)
            except Exception as error:
                if stream is not None:
                    torch.cuda.set_stream(stream)  # a capture that fails leaves its own in place
                lines = str(error).strip().splitlines() or ["no message"]
                failure = f"{type(error).__name__}: {lines[0][:200]}"
            found.failure = self.ranks.first_failure(failure)
            found.first_steps_s = round(time.monotonic() - start_s, 2)
        self.compile_s += found.first_steps_s if case.compiled else 0.0
        if found.failure is not None:
            self.models.pop(case, None)
        if self.ranks.rank == 0:
            mode = "compiled" if case.compiled else "eager"
            note = found.failure or "ready"
            print(f"{case.name} {mode}: {note}, {found.first_steps_s} s", file=sys.stderr)
        return found

    def _over_budget(self, case: Case) -> str | None:
        limit_s = self.settings.compile_seconds
        if case.compiled and max(self.ranks.gather(self.compile_s)) > limit_s:
            return f"not compiled: --compile-seconds {limit_s:g} are spent"
        return None

    def _run_first_steps(self, case: Case, found: Found, kept_bytes: int) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with self._in_force(case):
            ours = self._sequence_parallel(case)
            before = ours.stats()["attention_calls"] if ours else 0
            seen = compiler_counts()
            self.models[case] = self.model
            how, mode = self.settings.compile, self.settings.compile_mode
            if case.compiled and how:
                name = f"forward_{len(self.models)}"
                self.models[case] = compiled_by_xdit(
                    self.model, self.settings.module, name, how, mode
                )
            for _ in range(WARM_UPS[case.compiled]):
                out = self._step(case)
            self._synchronize()
        found.peak_bytes = self._memory("max_memory_allocated") - kept_bytes + self.model_bytes
        found.compiler = {name: count - seen[name] for name, count in compiler_counts().items()}
        if ours:
            assert ours.stats()["attention_calls"] > before, "torus was not called"
            schedule = ours.plan.schedule
            found.symmetric_bytes = ours.plan.symmetric_bytes
            found.plan = f"{schedule.name} {ours.plan.mesh} groups={schedule.groups_per_rank}"
        if self.expected is None and case.kind == "stock":
            self.expected = out.clone()
        if self.expected is not None:
            found.error = relative_error(out, self.expected)
            if case.kind != "ceiling" and not found.error <= MAX_ERROR[self.settings.dtype]:
                raise ValueError(f"wrong: relative error {found.error:.2g}")

    def _turn(self, case: Case, found: Found) -> None:
        self._synchronize()
        with self._in_force(case):
            self.ranks.barrier()
            if self.on_gpu:
                # The GPUs leave this together, closer than the hosts leave their barrier.
                dist.all_reduce(self.token)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
            start_s = time.perf_counter()
            for _ in range(self.settings.steps):
                self._step(case)
            seconds = host_seconds = time.perf_counter() - start_s
            if self.on_gpu:
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
        found.ms.append(seconds * 1e3 / self.settings.steps)
        found.host_ms.append(host_seconds * 1e3 / self.settings.steps)

    def _memory(self, what: str) -> int:
        return getattr(torch.cuda, what)() if self.on_gpu else 0

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def joined(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's findings of all ranks: a turn took as long as its slowest rank."""

    def slowest(name: str) -> list[float]:
        turns = zip(*(rank[name] for rank in ranks), strict=True)
        return [round(max(turn), 4) for turn in turns]

    ms, host_ms = slowest("ms"), slowest("host_ms")
    errors = [rank["error"] for rank in ranks if rank["error"] is not None]
    peak_bytes = max(rank["peak_bytes"] + rank["symmetric_bytes"] for rank in ranks)
    return {
        "name": case.name,
        **dataclasses.asdict(case),
        "failure": ranks[0]["failure"],
        "plan": ranks[0]["plan"],
        "compiler": ranks[0]["compiler"],
        "relative_error": max(errors, default=None),
        "ms": spread(ms) if ms else None,
        "host_ms": spread(host_ms) if host_ms else None,
        "samples_ms": ms,
        "peak_gib": round(peak_bytes / GIB, 3),
        "symmetric_gib": round(ranks[0]["symmetric_bytes"] / GIB, 3),
        "first_steps_s": max(rank["first_steps_s"] for rank in ranks),
    }


def compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ratio of the fastest of xDiT's own, eager to eager and compiled to compiled."""
    for compiled in (False, True):
        mine = [r for r in results if r["compiled"] is compiled and r["ms"]]
        stock = [r for r in mine if r["kind"] == "stock"]
        if not stock:
            continue
        best = min(stock, key=lambda r: r["ms"]["median"])
        best["is_best_stock"] = True
        for result in mine:
            pairs = zip(best["samples_ms"], result["samples_ms"], strict=True)
            result["best_stock_over"] = spread([theirs / ours for theirs, ours in pairs])
    return results
