"""A decoder's objective over interchanges: Distributed Alignment Search (DAS).

    DII(b, s, R) = b + R^T (R s - R b)                      R [r, D] with orthonormal rows, trained; b, s [D]
    loss         = -log p(counterfactual | base prompt, b <- DII(b, s, R) at its edited tokens)

b: the hidden states of the base prompt at a site and its edited tokens; s: those of the source prompt at the same site, at its own edited
tokens in their order, in a run without any edit. The counterfactual is what the model would say if a causal variable had the value that it
has in the source: where the loss is low on held-out pairs, the r directions carry that variable.

With s fixed, c = R s, the interchange is ConsReFT, b + R^T (c - R b): the adapter that is written has the mean of R s over the training
sources, and ``adapter_of_source`` gives it that of a source of one's own.

pyvene's LowRankRotatedSpaceIntervention has the same formula, with R^T as its weight, and takes the states of a run without edits, too.

Sources: Geiger et al. 2024, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations"; Wu et al.
2024, "ReFT", equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import context_of, pad_token, stop_tokens, vocabulary_of
from reft_export.eager.steering import EditFn, Steering, edit_rows, steer
from reft_export.training.data import Example, Examples, TrainingData, collate
from reft_export.training.generation import CompletionObjective, check_vocabulary, greedy_samples
from reft_export.training.greedy import text_of
from reft_export.training.interchange_data import SAMPLE, load_interchanges
from reft_export.training.interventions import Intervention, Interventions
from reft_export.training.metrics import AnswerMetric
from reft_export.training.objective import Loop, Origin, Outcome, Phase, Sample, tokenizer_of
from reft_export.training.settings import ROTATION, TrainSettings
from reft_export.training.source_states import SourceStates, Tokens, edited_slots
from reft_export.training.sources import Lines
from reft_export.training.teacher import Teacher
from reft_export.training.ways import Batch, Loss, Way, loss_of
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Site
from runtimes.edits.positions import Positions, RuleSets
from runtimes.errors import InputError
from runtimes.generation import PAD


class Interchange:
    """The edits, while each row of a batch has a source of its own, which ``steering.sources`` names."""

    def __init__(self, interventions: Interventions, states: SourceStates) -> None:
        self.interventions, self.states = interventions, states
        self.steering: Steering | None = None

    def edits(self) -> dict[Site, EditFn]:
        return {site: partial(self._edit, site) for site in self.interventions.sites}

    def _edit(self, site: Site, h: Tensor, slot: Tensor) -> Tensor:
        each = enumerate(self.interventions.by_slot(site))
        return edit_rows(h, slot, [None if module is None else partial(self._exchanged, site, number, module) for number, module in each])

    def _exchanged(self, site: Site, slot: int, module: Intervention, h: Tensor) -> Tensor:
        assert self.steering is not None, "the edits are steered by nobody"
        source = self.states.at(site, slot, self.steering.sources)
        return module.interchanged(h, source.to(h.device, h.dtype))

    @torch.no_grad()
    def fix(self, sources: Sequence[Tokens]) -> None:
        """Sets every s to the mean of R h over the edited tokens of ``sources``: of one source and one token a slot, the interchange with
        it exactly."""
        for site in self.interventions.sites:
            by_slot = self.interventions.by_slot(site)
            for module in dict.fromkeys(each for each in by_slot if each is not None):
                rows = torch.cat([self.states.at(site, slot, sources) for slot, each in enumerate(by_slot) if each is module])
                R = module.parameters_of()["R"].double()
                module.start_at({"s": R @ rows.to(R.device, R.dtype).mean(0)})


class InterchangeObjective(CompletionObjective):
    """Of prompts and their sources."""

    def __init__(self, base: Base, settings: TrainSettings, origin: Origin) -> None:
        super().__init__(base, settings, origin)
        if origin.teacher is not None:
            raise InputError("a teacher's answers have no sources, which objective interchange is of; leave one of the two out")
        self._exchange: Interchange | None = None

    @property
    def exchange(self) -> Interchange:
        assert self._exchange is not None, "nothing is trained yet"
        return self._exchange

    def read(self, data: Lines, max_length: int) -> TrainingData[Example]:
        chat_template = self.settings.chat_template
        tokenizer, stop = tokenizer_of(self.base), self.stop_tokens
        read = load_interchanges(data, tokenizer, max_length=max_length, chat_template=chat_template, stop_tokens=stop)
        sources = [replace(example, input_ids=example.source) for example in read.examples]
        check_vocabulary([*read.examples, *sources], vocabulary_of(self.base))
        return read

    def check_positions(self, data: TrainingData[Example], rule: Positions) -> None:
        for example in data.examples:
            length, source = example.prompt_length, len(example.source)
            check_source_length(source, rule, example.where)
            own, other = (edited_slots(rule, each, tied=self.settings.tied) for each in (length, source))
            if own != other:
                raise InputError(
                    f"{example.where}: positions {rule} edit {len(own)} of the prompt's {length} tokens and {len(other)} of the source's "
                    f"{source}, and an interchange needs as many of both; use positions l1, or prompts of one length"
                )

    def record(self) -> dict[str, Any]:
        return {"objective": self.settings.objective}

    def edits(self, interventions: Interventions) -> Mapping[Site, EditFn]:
        return self.exchange.edits()

    def train(
        self,
        interventions: Interventions,
        rule: Positions,
        examples: Examples[Example],
        loop: Loop,
        phase: Phase,
        metric: AnswerMetric | None = None,
    ) -> Outcome:
        sources = [example.source for example in (*examples.training, *examples.held_out)]
        states = SourceStates(self.base, interventions.sites, rule, tied=self.settings.tied)
        phase(f"computing the hidden states of {len(set(sources))} sources")
        states.read(sources, self.settings.batch_size)
        self._exchange = Interchange(interventions, states)
        for module in interventions.each.values():
            assert isinstance(module, Intervention)
            module.get_parameter("s").requires_grad_(False)
        outcome = super().train(interventions, rule, examples, loop, phase, metric)
        learned = [example.source for example in examples.training]
        self.exchange.fix(learned)
        notes = outcome.notes
        if any(len(slots) > len(set(slots)) for slots in map(states.slots_of, learned)):
            notes = (
                *notes,
                "an adapter has one s for all the edited tokens of a slot: the mean of theirs; of one token it is the interchange",
            )
        return replace(outcome, record={**outcome.record, "s": f"mean of R h over {len(learned)} sources"}, notes=notes)

    def loss(
        self, steering: Steering, examples: Examples[Example], lesson: Teacher | None, phase: Phase
    ) -> tuple[Loss, int, tuple[str, ...]]:
        self.exchange.steering = steering
        return loss_of, self.exchange.states.size, ()

    @torch.no_grad()
    def found(self, way: Way, interventions: Interventions, examples: Examples[Example]) -> tuple[str, ...]:
        """The interchange accuracy (IIA): the share of pairs whose counterfactual is what the model goes on with, greedily."""
        interventions.eval()
        steering, size, pad = self.exchange.steering, self.settings.batch_size, pad_token(self.base)
        assert steering is not None
        base, exchanged = list[bool](), list[bool]()
        for first in range(0, len(examples.shown), size):
            tensors = collate(examples.shown[first : first + size], pad_token_id=PAD if pad is None else pad)
            batch = Batch.of(tensors, self.base.model.device)
            exchanged += completed(way(batch), batch)
            with steering.switched_off():
                base += completed(way(batch), batch)
        which = "held-out" if examples.held_out else "training"
        shares = " to ".join(f"{sum(each) / len(each):.1%}" for each in (base, exchanged))
        return (f"interchange accuracy of {len(base)} {which} pairs, base to interchanged: {shares}",)

    def samples(self, examples: Examples[Example], phase: Phase, adapter: Adapter | None = None) -> tuple[Sample, ...]:
        """The base's answers; and after training those under the interchange with each prompt's own source."""
        asked = examples.shown[: self.settings.samples]
        if adapter is None or not asked:
            found = super().samples(examples, phase)
        else:
            phase("sampling under interchanges")
            rule, tied = adapter.where, adapter.tied
            with steer(self.base.model, self.exchange.edits(), rule=rule, tied=tied) as self.exchange.steering:
                found = greedy_samples(self.base, asked, self.exchange.steering)
        sources = [text_of(self.base, example.source) for example in asked]
        return tuple(replace(each, prompt=f"{each.prompt} <- {source}") for each, source in zip(found, sources, strict=True))


def completed(logits: Tensor, batch: Batch) -> list[bool]:
    """Of every row whether the likeliest token is the label at each of its counted tokens; logits [n, V] are at those."""
    right = logits.argmax(-1) == batch.targets
    return [bool(row.all()) for row in right.split(batch.counted.sum(1).tolist())]


def check_source_length(length: int, rule: Positions, where: str) -> None:
    """Raises InputError for a source of ``length`` tokens of which some rule edits none."""
    for each in rule.rules if isinstance(rule, RuleSets) else (rule,):
        if not edited_slots(each, length, tied=True):
            raise InputError(f"{where}: the source has {length} token(s), and positions {each} edit none of them; lengthen it")


def adapter_of_source(base: Base, rotation: Adapter, source: str) -> Adapter:
    """The ConsReFT h + R^T (R h_source - R h): ``rotation``, as ``train`` with objective interchange wrote it, with the s of a source text.

    It sets what R reads to what it reads in the source, at the edited tokens of any prompt: with one edited token a slot, the interchange
    with that source exactly; with several, with the mean over its tokens. ``source`` goes through the chat template where the training's
    prompts did. R stays as it is, to the bit.

    Raises InputError for a base that is no decoder, an adapter of another method, and a source with no token to be edited.
    """
    if base.task != TEXT_GENERATION:
        raise InputError(f"{base.info.name} is a classifier, and a rotation is a decoder's; give the base that it was trained on")
    if other := [form.method for form in rotation.site_forms.values() if form.method != ROTATION]:
        raise InputError(f"the adapter is of {other[0]}, and a rotation is a {ROTATION} of `train --objective interchange`; give one")
    tokenizer, rule = tokenizer_of(base), rotation.where
    data = rotation.training.get("data")
    plain = isinstance(data, Mapping) and data.get("chat_template") is False
    template, context, stop = "never" if plain else "auto", context_of(base), stop_tokens(base)
    line = {**SAMPLE, "source": source}
    (example,) = load_interchanges([line], tokenizer, max_length=context, chat_template=template, stop_tokens=stop).examples
    tokens = example.source
    states = SourceStates(base, rotation.sites, rule, tied=rotation.tied)
    interventions = Interventions(
        rotation.site_forms,
        width=base.info.hidden_size,
        tied=rotation.tied,
        rules=rotation.site_rules if isinstance(rule, RuleSets) else None,
    )
    interventions.start_from(rotation)
    check_source_length(len(tokens), rule, "the source")
    states.read([tokens], 1)
    Interchange(interventions, states).fix([tokens])
    made = interventions.to_adapter(base.info, rule)
    tensors = {name: value if name.endswith(".s") else rotation.tensors[name] for name, value in made.tensors.items()}
    training = {**rotation.training, "s": "R h of source", "source": source, "rotation": rotation.digest}
    return replace(rotation, tensors=tensors, training=training, probes=())
