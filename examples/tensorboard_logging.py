"""Train a small normalised discriminator and write its norms to TensorBoard: `tensorboard_logging.py [STEPS]`."""

import sys

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import opnorm


def main(steps: int = 100) -> None:
    """Hinge loss on noise; look at the curves with `tensorboard --logdir runs`."""
    model = nn.Sequential(
        opnorm.spectral_norm(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(),
        opnorm.spectral_norm(nn.Linear(16 * 16 * 16, 1)),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.0, 0.9))
    monitor = opnorm.Monitor(model)
    with SummaryWriter() as writer:
        for step in range(steps):
            real, fake = torch.randn(16, 3, 32, 32) + 0.5, torch.randn(16, 3, 32, 32)
            loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in monitor().items():
                writer.add_scalar(name, value, step)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
