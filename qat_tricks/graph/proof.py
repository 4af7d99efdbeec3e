"""Proofs: what a trick does to the network's output, on images that the trick does not see.

The output is compared with the float network's, without labels: the divergence of Kullback and
Leibler, ``KL(softmax(float) || softmax(quantized))``, of each image, and the SQNR of the logits. A
trick harms if the mean of the divergences' change, paired by image, lies above 0 with its interval
of 95 % (Student 1908). Then it is rolled back: by thirds of the layers that it changed where the
others help, else as a whole. Of a network with several outputs the logits are judged.

A trick that comes before the quantizers, such as equalization, keeps the float function; its effect
shows only in the network quantized. So a copy with the trick and one without are quantized as the
recipe will do it, on a few images.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, batch_size, call_network
from qat_tricks.graph.layers import activation_quantizers, is_calibrated
from qat_tricks.graph.logits import check_batch_first, logits_of
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.output_error import divergences
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.graph.snapshot import Snapshot
from qat_tricks.numerics.decibels import decibels

PROOF_IMAGES = 64  # held out from all tricks
SHARE = 4  # at most one of so many calibration images is held out
FEWEST = 8  # images; fewer tell nothing
ALL_COUNTED = PROOF_IMAGES * SHARE  # with so many images, no more need to be counted
PARTS = 3  # into which a trick that harms is split
CONFIDENCE = 0.95
LARGEST = 1e6  # nats

Apply = Callable[[], None]
"""Applies a trick to the network under work."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one trick has done to the error of the output."""

    trick: str
    images: int  # held out, on which it was measured
    kl_before: float | None  # mean divergence of an image from the float network, in nats
    kl_after: float | None  # with the whole trick, before anything was rolled back
    change: tuple[float, float] | None  # interval of the paired change
    sqnr_before_db: float | None  # of the logits
    sqnr_after_db: float | None
    # "kept", "rolled back", "rolled back in part" or "not judged"
    verdict: str
    reason: str | None = None  # why it was not judged
    undone: tuple[str, ...] = ()  # layers of a part that was rolled back
    kl_kept: float | None = None  # after what was rolled back

    @property
    def is_rolled_back(self) -> bool:
        """Whether something of the trick was rolled back."""
        return self.verdict.startswith("rolled back")

    @property
    def line(self) -> str:
        """What a person is told as soon as it is measured."""
        if self.sqnr_after_db is None:
            return f"{self.trick} {self.verdict}"
        before = "" if self.sqnr_before_db is None else f", {self.sqnr_before_db:.1f} before"
        return f"{self.trick} {self.verdict}: logits at {self.sqnr_after_db:.1f} dB{before}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a spec and a report."""
        return asdict(self) | {
            "change": None if self.change is None else list(self.change),
            "undone": list(self.undone),
        }


@dataclass(frozen=True)
class _Error:
    """The error of a network's output on the images held out."""

    kl: Tensor  # of each image, float64 [images]
    sqnr_db: float

    @property
    def mean(self) -> float:
        return float(self.kl.mean())


@dataclass
class Prover:
    """Judges tricks by the network's output.

    Args:
        batches: images that no trick sees, a batch each.
    """

    batches: Sequence[Inputs]
    expected: list[Tensor] = field(default_factory=list)  # the float network's logits
    reason: str | None = None  # why the network's output cannot be judged
    _last: _Error | None = None  # of the network as the last trick has left it

    @property
    def images(self) -> int:
        """How many images were held out."""
        return sum(map(batch_size, self.batches))

    def begin(self, traced: fx.GraphModule) -> None:
        """Takes the float function of ``traced`` as what its output should be."""
        self.expected, self._last, self.reason = [], None, None
        try:
            with evaluating(traced), float_mode(traced):
                self.expected = self._logits(traced)
        except QatTricksError as error:  # a network that is no classifier is not judged
            self.reason = str(error)

    def forget(self) -> None:
        """A trick that is not judged has changed the network: its error is to be measured anew."""
        self._last = None

    def prove(
        self,
        name: str,
        traced: fx.GraphModule,
        apply: Apply,
        quantized: Callable[[fx.GraphModule], fx.GraphModule] | None,
    ) -> Proof:
        """Applies a trick, and rolls it back if it harms.

        Args:
            name: of the trick.
            traced: the network that ``apply`` changes.
            apply: the trick.
            quantized: makes a quantized, calibrated copy of a network without quantizers.
        """
        is_judged = self.reason is None
        if is_judged and quantized is not None and not activation_quantizers(traced):
            return self._prove_ahead(name, traced, apply, quantized)
        if not is_judged or not is_calibrated(traced):
            apply()
            return self._not_judged(name, self.reason or "there are no calibrated quantizers yet")
        before = self._last or self.measure(traced)
        snapshot = Snapshot(traced)
        apply()
        after = self.measure(traced)
        interval = paired_interval(before.kl, after.kl)
        self._last = after
        if interval[0] <= 0:
            return self._proof(name, before, after, interval, "kept")
        kept, undone = self._roll_back(traced, snapshot, before)
        self._last = kept
        verdict = "rolled back in part" if undone else "rolled back"
        return self._proof(name, before, after, interval, verdict, undone, kept)

    def _prove_ahead(
        self,
        name: str,
        traced: fx.GraphModule,
        apply: Apply,
        quantized: Callable[[fx.GraphModule], fx.GraphModule],
    ) -> Proof:
        """Judges a trick on a network without quantizers, by copies that are quantized."""
        before = self.measure(quantized(copy.deepcopy(traced)))
        snapshot = Snapshot(traced)
        apply()
        after = self.measure(quantized(copy.deepcopy(traced)))
        interval = paired_interval(before.kl, after.kl)
        if interval[0] <= 0:
            return self._proof(name, before, after, interval, "kept")
        snapshot.restore()
        return self._proof(name, before, after, interval, "rolled back", (), before)

    def _roll_back(
        self, traced: fx.GraphModule, snapshot: Snapshot, before: _Error
    ) -> tuple[_Error, tuple[str, ...]]:
        """Rolls back the parts of a trick that harm, or all of it.

        Returns:
            The error then, and the layers that were rolled back where others were not.
        """
        names = snapshot.changed()
        applied = Snapshot(traced)
        best, undone = before, tuple(names)
        for part in _parts(names):
            applied.restore()
            snapshot.restore(part)
            error = self.measure(traced)
            # Better than without the trick beyond chance, or the trick as a whole goes.
            if error.mean < best.mean and paired_interval(before.kl, error.kl)[1] < 0:
                best, undone = error, tuple(part)
        if undone == tuple(names):
            snapshot.restore()
            return before, ()
        applied.restore()
        snapshot.restore(undone)
        return best, undone

    def measure(self, traced: fx.GraphModule) -> _Error:
        """The error of the output of ``traced``."""
        with evaluating(traced):
            outputs = self._logits(traced)
        each = [divergences(e, o) for e, o in zip(self.expected, outputs, strict=True)]
        signal = sum(float(e.double().square().sum()) for e in self.expected)
        noise = sum(
            float((o.double() - e.double()).square().sum())
            for e, o in zip(self.expected, outputs, strict=True)
        )
        # Outputs that are not finite diverge without bounds, which have no mean.
        return _Error(torch.cat(each).clamp_max(LARGEST), decibels(signal, noise))

    @torch.no_grad()
    def _logits(self, traced: fx.GraphModule) -> list[Tensor]:
        found = []
        with kept_random_state():
            for batch in self.batches:
                seed_all(0)  # a network may draw random numbers in evaluation too
                logits = logits_of(call_network(traced, batch))
                check_batch_first(logits, batch_size(batch))
                if not logits.is_floating_point():
                    raise QatTricksError(f"outputs of {logits.dtype} are no logits")
                found.append(logits.float())
        return found

    def _proof(
        self,
        name: str,
        before: _Error,
        after: _Error,
        interval: tuple[float, float],
        verdict: str,
        undone: Sequence[str] = (),
        kept: _Error | None = None,
    ) -> Proof:
        return Proof(
            trick=name,
            images=self.images,
            kl_before=before.mean,
            kl_after=after.mean,
            change=interval,
            sqnr_before_db=before.sqnr_db,
            sqnr_after_db=after.sqnr_db,
            verdict=verdict,
            undone=tuple(undone),
            kl_kept=(kept or after).mean,
        )

    def _not_judged(self, name: str, reason: str) -> Proof:
        unknown: dict[str, Any] = dict.fromkeys(
            ("kl_before", "kl_after", "change", "sqnr_before_db", "sqnr_after_db")
        )
        return Proof(trick=name, images=self.images, verdict="not judged", reason=reason, **unknown)


def held_out_of(images: int) -> int:
    """How many of so many calibration images are held out; 0 where too few would be left."""
    count = min(PROOF_IMAGES, images // SHARE)
    return count if count >= FEWEST else 0


def paired_interval(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The interval of the mean of ``after - before``, a value each image.

    Args:
        before: ``[images]``, two or more.
        after: the same images.

    Returns:
        Both ends, at a confidence of 95 %.
    """
    change = after.double() - before.double()
    mean, error = float(change.mean()), float(change.std()) / math.sqrt(len(change))
    # A mean of few values varies more than its own estimate of the spread tells.
    reach = float(stdtrit(len(change) - 1, 0.5 + CONFIDENCE / 2)) * error
    return mean - reach, mean + reach


def _parts(names: Sequence[str]) -> list[Sequence[str]]:
    """``names`` in a few runs of neighbours."""
    size = -(-len(names) // PARTS)
    parts = [names[first : first + size] for first in range(0, len(names), size)] if size else []
    return parts if len(parts) > 1 else []


def proof_lines(proofs: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each trick that did not stay as a whole, and one for the others."""
    lines = []
    for proof in proofs:
        if proof["verdict"].startswith("rolled back"):
            what = proof["verdict"]
            if proof["undone"]:
                what += f" ({proof['undone'][0]} to {proof['undone'][-1]})"
            lines.append(
                f"{proof['trick']} {what}: it took the output's divergence from "
                f"{proof['kl_before']:.3g} to {proof['kl_after']:.3g}"
            )
    unjudged = [proof for proof in proofs if proof["verdict"] == "not judged"]
    if unjudged:
        names = ", ".join(proof["trick"] for proof in unjudged)
        lines.append(f"not judged: {names}; {unjudged[0]['reason']}")
    kept = [proof for proof in proofs if proof["verdict"] == "kept"]
    if kept:
        names = ", ".join(proof["trick"] for proof in kept)
        lines.append(f"proved on {kept[0]['images']} images held out: {names}")
    return lines
