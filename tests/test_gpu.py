"""A GPU computes what a CPU does, within rounding: scoring, losses, encoding, training, judging, reading and graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import small_llm, test_allmrec_reader, test_judgment, word_llm
from tests.killed import Killed, kill_at
from tests.test_cf_models import _block_matrix
from tests.test_filterllm import DIMENSION, USERS, WIDTH, _options, _shop
from tests.test_text_encoder import TEXTS
from udfs import backbone, bpr, distribution_loss, lightgcn, lora, pair_training, sampled_softmax, sgcl, sgl
from udfs.cf_inputs import CfParams
from udfs.cf_model import fit
from udfs.checkpoints import Checkpoints
from udfs.filterllm import Config, FilterLLM
from udfs.filterllm_items import FrozenTexts
from udfs.filterllm_training import initialise, train
from udfs.judgment import Judge
from udfs.model_files import find_model
from udfs.sampled_softmax import Proposal
from udfs.streaming_topk import top_k
from udfs.text_encoder import TextEncoder
from udfs.user_sampling import draw

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return "cuda"


def _close(found, expected, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found).cpu(), torch.as_tensor(expected), rtol=rtol, atol=atol)


def _alike(found: np.ndarray, expected: np.ndarray, dtype: str, atol: float) -> None:
    """In float32 within `atol`; in bfloat16, where each device rounds at its own places, in the same order but for near ties."""
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, atol=atol)
    else:
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97


def _vocabulary(users: int = 20_000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [60, 16], keys [users, 16], bias and allowed [users]."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(size, 16, generator=generator) for size in (60, users))
    return queries, keys, torch.randn(users, generator=generator), torch.rand(users, generator=generator) < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_and_log_sum_exp(device: str, dtype: torch.dtype) -> None:
    queries, keys, bias, allowed = _vocabulary()
    expected, found = (
        top_k(queries.to(where), keys.to(where, dtype), 20, bias=bias.to(where), allowed=allowed.to(where), tile=4096)
        for where in ("cpu", device)
    )
    assert torch.equal(found.users.cpu(), expected.users)
    _close(found.logits, expected.logits, rtol=1e-6, atol=0.0)
    _close(found.lse, expected.lse, rtol=0.0, atol=1e-5)


def test_draws_without_replacement(device: str) -> None:
    queries, keys, bias, allowed = _vocabulary()
    options = {"item_ids": [f"item-{n}" for n in range(len(queries))], "seed": 7, "temperature": 0.9, "tile": 4096}
    expected, found = (
        draw(*(t.to(where) for t in (queries, keys)), 20, bias=bias.to(where), allowed=allowed.to(where), **options)
        for where in ("cpu", device)
    )
    same = found.users.cpu() == expected.users
    # Two users may change places where what they are drawn by lies within rounding.
    assert (same | ((found.scores.cpu() - expected.scores).abs() < 1e-6)).all()
    assert same.float().mean() > 0.99
    _close(found.lse, expected.lse, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_distribution_loss_and_its_gradients(device: str, softmax: str) -> None:
    hidden, vocabulary, bias, _ = _vocabulary(3000)
    generator = torch.Generator().manual_seed(1)
    users = torch.cat([torch.randperm(3000, generator=generator)[: 1 + n % 7] for n in range(len(hidden))])
    indptr = torch.tensor([0, *(1 + n % 7 for n in range(len(hidden)))]).cumsum(0)
    results = []
    for where in ("cpu", device):
        leaves = [t.clone().to(where).requires_grad_() for t in (hidden, vocabulary, bias)]
        given = (leaves[0], leaves[1], indptr.to(where), users.to(where), leaves[2])
        if softmax == "full":
            losses = distribution_loss.loss(*given, chunk=700)  # one tile is kept, the others are computed again
        else:
            drawn = Proposal("popularity", np.arange(3000)).draw(500, seed=1, epoch=1, step=0, device=where)
            losses = sampled_softmax.loss(*given, drawn=drawn, chunk=300)
        gradients = torch.autograd.grad(losses.mean(), leaves)
        results.append([losses.detach(), *(gradient.to_dense() for gradient in gradients)])
    for expected, found in zip(*results, strict=True):
        _close(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_text_vectors(device: str, dtype: str, tolerance: float) -> None:
    directory = find_model("minilm").directory
    expected, found = (
        TextEncoder(directory, dtype=dtype, device=where).encode(TEXTS)  # type: ignore[arg-type]
        for where in ("cpu", device)
    )
    assert np.linalg.norm(found - expected, axis=1).max() < tolerance  # of vectors of length 1


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_filterllm_training(device: str, softmax: str, tmp_path: Path) -> None:
    shop, hidden, vocabulary, _ = _shop()
    options = _options(epochs=4, softmax=softmax, samples=40)
    results = []
    for where in ("cpu", device):
        # What is dropped or added at random is another on each device.
        model = FilterLLM(Config(WIDTH, DIMENSION, USERS, hidden=32, dropout=0.0))
        initialise(model, vocabulary, np.bincount(shop.users, minlength=USERS), hidden, seed=3)
        model.to(where)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        texts, checkpoints = FrozenTexts(hidden).to(where), Checkpoints(str(tmp_path / f"{len(results)}"))
        facts = train(model, texts, shop, options, [].append)
        results.append((facts, model.queries(hidden)))
        # Killed in epoch 3, it goes on behind epoch 2: what was saved goes back to where the model is.
        model.load_state_dict(start)
        with pytest.raises(Killed):
            train(model, texts, shop, options, kill_at(3), checkpoints=checkpoints)
        model.load_state_dict(start)
        lines: list[str] = []
        again = train(model, texts, shop, options, lines.append, checkpoints=checkpoints)
        assert lines[0] == "goes on behind epoch 2, which was saved"
        assert [one["loss"] for one in again["history"]] == pytest.approx(
            [e["loss"] for e in facts["history"]], rel=1e-4
        )
        np.testing.assert_allclose(model.queries(hidden), results[-1][1], atol=1e-3)
    (expected, queries), (found, others) = results
    for one, other in zip(expected["history"], found["history"], strict=True):
        for figure in ("loss", "guiding", "validation_nll"):
            assert other[figure] == pytest.approx(one[figure], rel=1e-3)
    assert found["scale"] == pytest.approx(expected["scale"], rel=1e-2)
    np.testing.assert_allclose(others, queries, atol=0.02)


def test_a_lora_step(device: str) -> None:
    """On a GPU the language model computes in bfloat16 while adapters are trained: loss and gradient are near, not the same."""
    directory, index = find_model("minilm").directory, np.arange(len(TEXTS))
    generator = torch.Generator().manual_seed(2)
    towards = torch.randn(len(TEXTS), 384, generator=generator)
    results, start = [], {}
    for where in ("cpu", device):
        encoder = TextEncoder(directory, max_tokens=32, device=where)
        lora.attach(encoder, rank=4, alpha=8, dropout=0.0, seed=1)
        adapters = {name: p for name, p in encoder.model.named_parameters() if p.requires_grad}
        for name, parameter in adapters.items():
            # Adapters that begin at zero would leave the other half of the gradients zero.
            start.setdefault(name, 0.05 * torch.randn(parameter.shape, generator=generator))
            parameter.data.copy_(start[name])
        vectors = lora.LoraTexts(encoder, TEXTS)(index)
        assert vectors.dtype == torch.float32
        loss = (vectors * towards.to(where)).square().sum(1).mean()
        loss.backward()
        optimizer = torch.optim.AdamW(adapters.values(), lr=1e-3)
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in adapters.values())
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in adapters.values()])))
    (expected, slope), (found, other) = results
    assert found == pytest.approx(expected, rel=0.02)
    assert torch.nn.functional.cosine_similarity(slope, other, dim=0) > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_judges_likelihoods(device: str, dtype: str, tmp_path: Path) -> None:
    directory = small_llm.build(tmp_path)
    pairs = (test_judgment.HISTORIES, test_judgment.TITLES, test_judgment.USERS, test_judgment.ITEMS)
    judges = [Judge(directory, dtype=dtype, device=where) for where in ("cpu", device)]  # type: ignore[arg-type]
    for share in (True, False):
        expected, found = (judge.score(*pairs, share_prefix=share) for judge in judges)
        _alike(found, expected, dtype, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_readers_likelihoods(device: str, dtype: str, tmp_path: Path) -> None:
    directory = word_llm.build(tmp_path, test_allmrec_reader.TITLES)
    users, histories, candidates = test_allmrec_reader.asked()
    results = []
    for where in ("cpu", device):
        reader = test_allmrec_reader.untrained(directory, dtype=dtype, device=where)
        reader.projections.to(where)
        catalogue = reader.catalogue(test_allmrec_reader.TITLES, test_allmrec_reader.JOINTS)
        given = (catalogue, users, histories, candidates)
        loss = reader.loss(*given)
        loss.backward()
        assert len(reader.generate(*given)) == len(users)
        slope = torch.cat([p.grad.flatten() for p in reader.projections.parameters()]).cpu().numpy()
        scores = [reader.score(*given, share_prefix=share) for share in (True, False)]
        results.append((loss.item(), slope, *scores))
    (loss, slope, *scores), (other, other_slope, *other_scores) = results
    assert other == pytest.approx(loss, rel=1e-4 if dtype == "float32" else 0.05)
    for found, expected in zip([other_slope, *other_scores], [slope, *scores], strict=True):
        _alike(found, expected, dtype, atol=1e-3)


@pytest.mark.parametrize(
    "objective_of", [bpr.Bpr, lightgcn.objective, sgl.Sgl, sgcl.Sgcl], ids=["bpr", "lightgcn", "sgl", "sgcl"]
)
def test_losses_and_gradients_of_cf_models(device: str, objective_of, monkeypatch: pytest.MonkeyPatch) -> None:
    def negatives(self: bpr.NegativeSampler, users: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A generator draws others on each device."""
        items = (7 * users + 3) % self._n_items
        return items, ~self._is_positive(users, items)

    monkeypatch.setattr(bpr.NegativeSampler, "__call__", negatives)
    pairs, _ = _block_matrix()
    start = torch.randn(96, DIMENSION, generator=torch.Generator().manual_seed(2))
    results = []
    for where in ("cpu", device):
        users, items = (torch.from_numpy(side.astype(np.int64)).to(where) for side in (pairs.users, pairs.items))
        generator = torch.Generator(device=where).manual_seed(1)
        data = pair_training.Data(users, items, torch.ones(len(users), device=where), 60, 36, generator)
        objective = objective_of(data, CfParams(dimension=DIMENSION, layers=3, edge_dropout=0.0, device=where))
        objective.begin_epoch()
        ego = start.clone().to(where).requires_grad_()
        loss = objective.loss(ego, torch.arange(0, len(users), 30, device=where))
        loss.backward()
        results.append([loss.detach(), ego.grad, objective.embeddings(ego).detach()])
    for expected, found in zip(*results, strict=True):
        _close(found, expected)


def test_als_by_conjugate_gradients(device: str) -> None:
    pairs, _ = _block_matrix()
    options = {"dimension": DIMENSION, "epochs": 3, "alpha": 10.0, "regularization": 0.5}
    expected, found = (
        users @ items.T
        for users, items in (
            fit("als_cg", pairs, 60, 36, CfParams(**options, device=where), seed=1) for where in ("cpu", device)
        )
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("kind", backbone.SEQUENCE_MODELS)
def test_users_of_sequence_models(device: str, kind: str) -> None:
    histories, model = test_allmrec_reader.asked()[1], backbone.build(kind, 1, items=8, dimension=16)
    expected, found = (backbone.of(model.to(where)).users(np.arange(4), histories) for where in ("cpu", device))
    # A GPU may round what goes into convolutions and recurrent layers to TF32.
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert expected.std() > 0.02
