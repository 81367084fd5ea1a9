"""Train a small CNN on digits with and without its Lipschitz bound in the loss.

`python examples/lipschitz_regulariser.py` prints the accuracy and the proved bound of each network.
"""

import torch
from torch import nn

import opnorm
from opnorm.data import digits


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 10),
    )  # fmt: skip


def train(weight: float, method: str = "afp", epochs: int = 8) -> tuple[float, float]:
    """Return the test accuracy and the proved Lipschitz bound."""
    torch.manual_seed(0)
    data, model = digits(), network()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    penalty = opnorm.LipschitzPenalty(model, data.train_images[:2], method=method)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(64):
            loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            if weight:
                loss = loss + weight * penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    accuracy = (model(data.test_images).argmax(1) == data.test_labels).double().mean()
    return float(accuracy), opnorm.lipschitz(model, data.test_images[:8], method="afp", time_budget=2.0).upper


def main(epochs: int = 8) -> dict[float, tuple[float, float]]:
    results = {}
    for weight in (0.0, 0.02, 0.1):
        accuracy, upper = results[weight] = train(weight, epochs=epochs)
        print(f"weight {weight:<5g} test accuracy {100 * accuracy:5.1f} %   proved Lipschitz bound {upper:6.2f}")
    return results


if __name__ == "__main__":
    main()
