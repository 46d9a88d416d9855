"""What the peers computed, against the same in double precision, every element of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import Experts, Inputs, Plan, Training
from torch import Tensor

MOST_ERROR = 1e-2  # bf16 comes to a third of it


def error_of(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; not a number where something was not written."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def complaints(errors: dict[str, list[float]]) -> list[str]:
    wrong = {name: [e for e in of if not e <= MOST_ERROR] for name, of in errors.items()}
    return [f"{name} is off by {of[0]:.2g}" for name, of in wrong.items() if of]


def poison(step: Experts | Training) -> None:
    """All arrays that the step writes, as earlier runs wrote them too."""
    for value in vars(step).values():
        if isinstance(value, Tensor):
            value.fill_(float("nan"))


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def slots_of(plan: Plan) -> list[slice]:
    ends = plan.ends.tolist()
    return [slice(begin, end) for begin, end in zip([0] + ends, ends)]


def check_experts(step: Experts, run: Callable[[], None]) -> list[str]:
    poison(step)
    run()
    errors = []
    for expert, slots in enumerate(slots_of(step.plan)):
        rows = step.inputs.x[step.plan.tokens[slots].long()].double()
        want = mlp(rows, step.inputs.gate_up[expert].double(), step.inputs.down[expert].double())
        errors.append(error_of(step.y[slots], want))
    return complaints({"y of an expert": errors})


class Sums:
    """What all experts add to: y, dx [T,D] and dweights [S]."""

    def __init__(self, inputs: Inputs) -> None:
        self.y = torch.zeros_like(inputs.x, dtype=torch.float64)
        self.dx = torch.zeros_like(self.y)
        pairs = inputs.case.tokens * inputs.case.top_k
        self.dweights = self.y.new_zeros(pairs)


def add_expert(step: Training, expert: int, slots: slice, sums: Sums) -> tuple[float, float]:
    """Adds what an expert gives; the errors of its weights' gradients."""
    tokens, pairs = step.plan.tokens[slots].long(), step.plan.pairs[slots].long()
    inputs = step.inputs
    leaves = (
        inputs.x[tokens].double(),
        inputs.gate_up[expert].double(),
        inputs.down[expert].double(),
        step.routing.weights.flatten()[pairs].double(),
    )
    x, gate_up, down, weights = (leaf.requires_grad_() for leaf in leaves)
    y = weights[:, None] * mlp(x, gate_up, down)
    y.backward(inputs.dy[tokens].double())
    sums.y.index_add_(0, tokens, y.detach())
    sums.dx.index_add_(0, tokens, x.grad)
    sums.dweights[pairs] = weights.grad
    got = step.dgate_up[expert], step.ddown[expert]
    return error_of(got[0], gate_up.grad), error_of(got[1], down.grad)


def router_gradients(step: Training, sums: Sums) -> tuple[Tensor, Tensor]:
    """Of x and of the router's weights, with the ids that the step chose."""
    x = step.inputs.x.double().requires_grad_()
    router = step.inputs.router.double().requires_grad_()
    chosen = torch.softmax(x @ router.T, dim=1).gather(1, step.routing.ids)
    weights = chosen / chosen.sum(dim=1, keepdim=True)
    weights.backward(sums.dweights.view_as(weights))
    return x.grad, router.grad


def check_choice(step: Training) -> list[str]:
    """The chosen probabilities have the sum of the greatest ones."""
    logits = step.inputs.x.double() @ step.inputs.router.double().T
    p = torch.softmax(logits, dim=1)
    best = p.topk(step.inputs.case.top_k, dim=1).values.sum(dim=1)
    chosen = p.gather(1, step.routing.ids).sum(dim=1)
    return [] if ((best - chosen).abs() <= 1e-5 * best).all() else ["the choice is not the best"]


def check_training(step: Training, run: Callable[[], None]) -> list[str]:
    poison(step)
    run()
    sums = Sums(step.inputs)
    weights = [add_expert(step, e, slots, sums) for e, slots in enumerate(slots_of(step.plan))]
    dx, drouter = router_gradients(step, sums)
    errors = {
        "dgate_up of an expert": [of[0] for of in weights],
        "ddown of an expert": [of[1] for of in weights],
        "y": [error_of(step.y, sums.y)],
        "dx": [error_of(step.dx, sums.dx + dx)],
        "drouter": [error_of(step.drouter, drouter)],
    }
    return complaints(errors) + check_choice(step)
