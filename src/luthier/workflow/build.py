"""The parts of a run put together: model, edits, batches, optimiser, loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from luthier import kernels
from luthier.core import ModelError, human_count
from luthier.data.batches import Batches, EvalBatches
from luthier.data.examples import Examples
from luthier.data.order import Order
from luthier.data.windows import OneWindowOfEach
from luthier.runs import RunFolder, reset_peak, resident_bytes
from luthier.surgery import Phases, Tuned, attach, compose
from luthier.training.early_stopping import Selection
from luthier.training.evaluate import Evaluator
from luthier.training.evaluations import Evaluations
from luthier.training.feed import Feed
from luthier.training.loop import Listener, Loop
from luthier.training.moments import Moments
from luthier.training.objective import Objective
from luthier.training.optimiser import optimiser_of
from luthier.training.packed_lines import padding_said, refuse_packing
from luthier.training.strategy import fills, neutral
from luthier.training.update_checks import refuse_inexact
from luthier.training.whole_steps import refuse_cut_steps
from luthier.workflow.load_model import collator_of, load_model
from luthier.workflow.load_others import load_others
from luthier.workflow.looks import Looks
from luthier.workflow.preparation import Prepared
from luthier.workflow.written_scores import written_scores

__all__ = ["build", "evaluator_of"]


def build(prepared: Prepared) -> Callable[[RunFolder, Listener], Loop]:
    """Load, attach, and give what makes the loop once there is a folder. Still nothing is written."""
    spec = prepared.spec
    reset_peak()
    begun = time.perf_counter()
    program = resident_bytes()  # Python, its libraries and the encoded rows, before any weight is there
    model, fresh = load_model(
        prepared.source, prepared.task, dtype=prepared.weights, device=prepared.device, seed=spec.seed,
        store=spec.codes,
    )  # fmt: skip
    model.config.pad_token_id = prepared.pad_id
    _check_finite(model, prepared.source.name)
    method = prepared.method
    tuned = attach(model, method, seed=spec.seed, new_tensors=fresh, sources=prepared.sources)
    wants_dropout = any(m.trains_base for m in method.parts()) or any(s.drops for s in prepared.strategies)
    still = [s.name for s in prepared.strategies if s.still]
    trunk_dropout = spec.trunk_dropout == "on" or (spec.trunk_dropout == "auto" and wants_dropout)
    trunk_dropout = trunk_dropout and not still
    if spec.fast:
        tuned.forward.route_attention()
        tuned.fast.accelerate(dropout=trunk_dropout)
    if spec.gradient_checkpointing is True:
        tuned.forward.checkpoint_activations()
    needs_logits = any(getattr(m, "needs_logits", False) for m in method.parts())
    strategies, sets = prepared.strategies, prepared.sets
    needs_logits = needs_logits or any("logits" in s.reads or fills(s, "weigh") for s in strategies)
    objective = Objective(
        tuned, prepared.task, full_logits=needs_logits, judge=prepared.judge, tokenizer=prepared.tokenizer,
        columns=prepared.columns,
    )  # fmt: skip
    order = _order(prepared)
    collator = collator_of(
        prepared.task, model, prepared.tokenizer, pad_id=prepared.pad_id, pad_to=spec.batch.pad_to, seed=spec.seed
    )
    if spec.batch.pack:
        refuse_packing(tuned, prepared.task, prepared.train, strategies)
    batches = Batches(
        prepared.train, order, collator, spec.batch.tokens, spec.batch.accumulate, spec.batch.workers, spec.batch.pack
    )
    later = spec.total_steps(order.steps_per_epoch) > order.steps_per_epoch  # in one epoch no row comes twice
    sees_attention = any("attention" in s.reads and not neutral(s) for s in strategies)
    sees_text = sees_attention or any({"embeddings", "states"} & set(s.reads) for s in strategies)
    if sees_attention:
        objective.first_token = None
    features = objective.keep_features(batches) if later and not sees_text else None
    Phases(tuned, method.parts()).check(Feed(spec, batches).total)
    refuse_cut_steps([s.name for s in prepared.strategies if s.whole_step], spec, batches)
    optimiser = optimiser_of(
        spec.optim,
        tuned.trained(),
        tuned.groups(),
        method.default_lr,
        [g for s in strategies for g in s.groups(tuned)],
        next((s.optimiser for s in strategies if fills(s, "optimiser")), None),
    )
    if not optimiser.whole_gradient:
        refuse_inexact(spec, tuned, batches, strategies, optimiser)
    metric = spec.eval.metric or prepared.task.headline
    every = spec.eval.every
    if every is None:
        every = order.steps_per_epoch if spec.eval.selects else 0

    def make(run: RunFolder, listener: Listener) -> Loop:
        if (
            prepared.task.name in ("causal_lm", "preference", "judged", "prompts", "masked_lm")
            and not needs_logits
            and objective.why_all_logits
        ):
            listener.say(
                f"the loss is computed from all logits of a batch, not of its targets alone: {type(model).__name__}: "
                f"{objective.why_all_logits}"
            )
        if still and spec.trunk_dropout == "on":
            listener.say(f"trunk_dropout = on is not heeded: {still[0]} compares chances, and makes its passes without")
        if features is not None and spec.fast and kernels.fast():
            listener.say(features.sentence())
        for remark in (*tuned.anatomy.remarks, *_stacks_said(tuned)):
            listener.say(remark)
        if prepared.task.name == "causal_lm" and (said := padding_said(batches)):
            listener.say(said)
        if spec.optim.weight_decay > 0:
            decays, rests = (human_count(n) for n in optimiser.decayed())
            listener.say(
                f"weight decay {spec.optim.weight_decay:g}: {decays} numbers decay; {rests} do not (norms, biases, and "
                "what the method keeps from it)"
            )
        feed = Feed(spec, batches)
        loop = Loop(
            spec=spec, tuned=tuned, objective=objective, feed=feed, optimiser=optimiser,
            moments=Moments(
                spec, tuned, prepared.task, optimiser, prepared.device, strategies,
                objective=objective, sets={"train": prepared.train}, models=load_others(prepared, listener.say),
                rows=sets, cut_rows=feed.cut_rows, precision=prepared.precision,
                tokenizer=prepared.tokenizer, say=listener.say, feed=feed, texts=getattr(run, "texts", None),
                columns=prepared.columns,
            ),
            evaluations=Evaluations(None, every, Selection(spec.eval, metric), at_end=spec.eval.selects),
            precision=prepared.precision, device=prepared.device, run=run,
            place=lambda row: prepared.train_table.places[row],
            identity={"spec": spec.digest(), "method": compose.spell(method), "model": prepared.source.digest},
            trunk_dropout=trunk_dropout,
            listener=listener,
            program_bytes=program,
        )  # fmt: skip
        loop.moments.looks = Looks(loop)
        loop.clock.loading = time.perf_counter() - begun
        # What nothing selects by may be looked at: without best or patience these are the test rows.
        looked_at = prepared.selection if spec.eval.selects else prepared.test
        if every and looked_at is not None:
            loop.evaluations.evaluator = evaluator_of(prepared, loop, looked_at)
        return loop

    return make


def _order(prepared: Prepared) -> Order:
    """Which examples make which step. Of a row that gives several, windows or versions, a step has one."""
    spec, train, sets = prepared.spec, prepared.train, prepared.sets
    windowed = spec.long == "windows" or prepared.task.draws > 1
    if windowed:
        sets = replace(sets, starts=tuple(np.searchsorted(train.firsts, sets.starts).tolist()))
    lengths = train.lengths[train.firsts] if windowed else train.lengths
    tasks = train.facts.get("task")
    order = Order(
        lengths[: sets.starts[1]], spec.batch.size, spec.seed, spec.batch.group_by_length,
        None if tasks is None else (tasks[train.firsts] if windowed else tasks)[: sets.starts[1]],
    )  # fmt: skip
    for one in prepared.strategies:
        if fills(one, "order"):
            order = one.order(order, sets, spec)
    return OneWindowOfEach(order, train) if windowed else order


def evaluator_of(prepared: Prepared, loop: Loop, examples: Examples) -> Evaluator:
    tokens = 2 * prepared.spec.batch.tokens
    objective = Objective(
        loop.tuned, prepared.task, scoring=True, judge=prepared.judge, tokenizer=prepared.tokenizer,
        columns=prepared.columns,
    )  # fmt: skip
    if (prepared.task.of_words or prepared.task.writes) and not objective.chunked:
        # Where all logits of a batch are held at once: 2^26 of them are 256 MiB in fp32.
        tokens = max(1, min(tokens, 2**26 // int(loop.tuned.model.get_input_embeddings().weight.shape[0])))
    evaluator = Evaluator(
        loop.tuned, objective,
        EvalBatches(examples, loop.feed.batches.collator, tokens), prepared.precision, prepared.device,
        lambda: loop.signals.check(),
    )  # fmt: skip
    table = prepared.test_table if examples is prepared.test else prepared.selection_table
    if prepared.spec.eval.writes and table is not None:
        evaluator.more = written_scores(prepared, loop, table)
    return evaluator


def _check_finite(model: Any, name: str) -> None:
    for tensor_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach()).all():
            raise ModelError(f"{name}: tensor {tensor_name} holds NaN or infinity. Use an undamaged copy of the model.")


def _stacks_said(tuned: Tuned) -> list[str]:
    """Where the tuning lies in a model of several stacks, and how to name another."""
    stacks = tuned.anatomy.stacks
    if not tuned.anatomy.text_stack:
        return []
    keys = {key.rpartition(".")[0] for key in tuned.trained()}
    counts = {stack: sum(f"@{stack}." in key for key in keys) for stack in stacks}
    where = ", ".join(f"{n} in {stack}" for stack, n in counts.items())
    other = next(stack for stack in stacks if stack != tuned.anatomy.text_stack)
    return [f"places of the tuning by stack: {where}; a stack is named as in sites=attn.q@{other}"]
