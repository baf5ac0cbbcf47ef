"""A speech model as torchaudio's are: a spectrogram convolved, walked both ways by LSTMs, and aligned by CTC."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpulayers.torch as gt

BANDS, LETTERS, BLANK = 8, 6, 0


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(BANDS, 16, 3, padding=1), nn.BatchNorm1d(16), nn.Hardtanh(0, 20))
        self.walk = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, LETTERS)

    def forward(self, x, lengths):  # (N, bands, T) → (T, N, letters)
        x = self.front(x).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.walk(packed)[0], batch_first=True)
        return F.log_softmax(self.head(x), -1).transpose(0, 1)


def sounds(samples, times=20):
    """Each letter rings in a band of its own for a few frames."""
    generator = torch.Generator().manual_seed(0)
    said = torch.stack([torch.randperm(LETTERS - 1, generator=generator)[:4] + 1 for _ in range(samples)])
    x = torch.randn(samples, BANDS, times, generator=generator) * 0.2
    for i, word in enumerate(said):
        for j, letter in enumerate(word):
            x[i, letter, 4 * j + 1 : 4 * j + 4] += 2
    return x, said, torch.tensor([times - i % 4 for i in range(samples)]), torch.full((samples,), 4)


def trained(model, loss, steps):
    x, said, lengths, letters = sounds(12)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        found = loss(model(x, lengths), said, lengths, letters)
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(found.detach()))
    return losses


def test_a_patched_model_trains():
    """To torch's losses step by step, and until it spells what it hears."""
    torch.manual_seed(0)
    plain = Speech()
    model = copy.deepcopy(plain)
    report = gt.patch(model, fuse=True)
    assert not report.left and {"walk", "head"} <= set(report.replaced)
    losses = trained(model, gt.CTCLoss(BLANK), 70)
    torch.testing.assert_close(losses[:10], trained(plain, nn.CTCLoss(BLANK), 10), rtol=1e-4, atol=0)
    assert losses[-1] < losses[0] / 10
    x, said, lengths, _ = sounds(12)
    for row, word, length in zip(model.eval()(x, lengths).argmax(-1).T, said, lengths):
        path = row[:length].unique_consecutive()
        assert path[path != BLANK].tolist() == word.tolist()
