"""PRISM (Seo, Han and Yoo, ICLR 2025) and FedPM (Isik et al., ICLR 2023): clients learn and send binary masks.

θ = sigmoid(s) are probabilities of a mask over frozen random weights. Client k trains scores s_k from s_t and sends a
mask M_k ~ Bern(θ_k), a bit a weight; θ̄ = mean_k M_k. MADA moves from the old scores to logit(θ̄) as far as two global
masks, M_old ~ Bern(sigmoid(s_t)) and M_new ~ Bern(θ̄), differ: s_{t+1} = d·logit(θ̄) + (1 − d)·s_t.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from fedray.aggregators import total
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.bits import (
    Share,
    check,
    coded_bits,
    described,
    distance,
    draw,
    estimated_bits,
    flat,
    pack,
    shaped,
    split,
    unpacking,
)
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.mask_privacy import MaskPrivacy
from fedray.seeds import seed_for
from fedray.trees import Params, scale

FLOOR = 0.01  # a mask's 0 and 1 count as 0.01 and 0.99, so that scores stay finite


@dataclass(frozen=True)
class ServerState:
    """The scores s, and the Beta posterior's counts of ones and of masks since its reset."""

    params: Params
    ones: torch.Tensor
    masks: float


def prism(
    *,
    local: LocalTraining,
    mada: Literal["hamming", "cosine", "fixed", "none"] = "hamming",
    rate: float = 0.5,
    similar: bool = False,
    space: Literal["score", "probability"] = "score",
    reset_every: int = 1,
    masks: int = 1,
    alpha: float = 0.0,
    alpha_of: Share = "weights",
    privacy: MaskPrivacy = MaskPrivacy(),
    coded: bool = False,
) -> FederatedAlgorithm:
    """Stochastic binary masks with a dynamic moving average (PRISM, Seo et al., 2025; mada=none is PRISM† and FedPM).

    Args:
        local: How a client trains its scores; Adam's moments stay with it. The paper: Adam at 0.1, 100 steps, batch 64.
        mada: The distance d of the two global masks that says how far the server moves; fixed for a fixed average, none
            to move all the way.
        rate: d of a fixed average.
        similar: Move by 1 − d instead: the other reading of the paper's text.
        space: Whether the average is of scores (the released code) or of probabilities (the paper's figure).
        reset_every: Rounds after which FedPM's Beta posterior starts anew; 1 for the mean of the round's masks.
        masks: Masks that a client sends.
        alpha: Share of the model, its last tensors, whose scores are sent and averaged instead (PRISM-α).
        alpha_of: What it is a share of: the weights, the tensors, or the 20 entries that the released code has of them.
        privacy: What happens to probabilities before masks are drawn.
        coded: Measure the bits a weight of a mask that is coded by what the server knows, and decode it again.
    """
    if local.local_optimizer == "sgd":
        raise ValueError("local_optimizer is sgd; scores are learnt by adam or adamw, whose moments the clients keep")
    check(alpha=(alpha, 0, 1), rate=(rate, 0, 1), reset_every=(reset_every, 1), masks=(masks, 1))
    parts = partial(split, share=1 - alpha, of=alpha_of)

    def client_update(learner: Learner, scores: Params, client: Client) -> ClientResult:
        kept = {} if client.state is None else client.state
        moments = {name: tensor.clone() for name, tensor in kept.get("moments", {}).items()}
        objective = getattr(learner.task, "objective", None)
        loss = objective(learner, client, kept.get("objective")) if objective else None
        y = learner.train(scores, client, local, loss=loss, moments=moments)
        masked, scored = parts(y.params)
        theta = flat(privacy.probabilities(masked, seed_for(client.seed, "noise")))
        bits = [draw(theta, seed_for(client.seed, "mask", i)) for i in range(masks)]
        known = flat(parts(scores)[0]).sigmoid()
        before = draw(known, seed_for(client.seed, "global"))
        metrics = {"train_loss": y.loss, "local_divergence": distance(before, bits[0]), **estimated_bits(bits[0])}
        metrics |= {"coded_bits": coded_bits(bits[0], known)} if coded else {}
        state = {"moments": moments, **({"objective": loss.kept} if loss else {})}
        return ClientResult({"masks": [pack(each) for each in bits], "scores": scored}, 1, metrics, state)

    def init(scores: Params) -> ServerState:
        return ServerState(scores, torch.zeros_like(flat(parts(scores)[0])), 0.0)

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        old, rule = flat(parts(state.params)[0]), unpacking(total(), len(state.ones))
        (sent, present), metrics = backend.map_reduce(client_update, state.params, cohort, rule, keeps_state=True)
        goes_on = (cohort[0].round - 1) % reset_every != 0
        ones, count = sent["ones"] + goes_on * state.ones, present * masks + goes_on * state.masks
        theta = FLOOR + (1 - 2 * FLOOR) * ones / count
        m_old, m_new = (
            draw(old.sigmoid(), seed_for(cohort[0].seed, "old")),
            draw(theta, seed_for(cohort[0].seed, "new")),
        )
        d = 1.0 if mada == "none" else distance(m_old, m_new, mada) if mada != "fixed" else rate
        d = 1 - d if similar else d
        new = d * theta.logit() + (1 - d) * old
        if space == "probability":
            new = (d * theta + (1 - d) * old.sigmoid()).logit()
        spent = privacy.account(parts(state.params)[0], cohort[0].round, masks, bare=alpha > 0)
        new_scores = shaped(new, state.params) | scale(sent["scores"], 1 / present)
        return ServerState(new_scores, ones, count), {**metrics, "mada_weight": d, **described(m_new), **spent}

    return FederatedAlgorithm(init, apply)
